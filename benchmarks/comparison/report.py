"""The results in words: tables in Markdown, and the lengths from which one method beats another.

`results` is what __main__.py writes as JSON.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

from benchmarks.comparison.learning import after_images, common_images, runs_by_method

# Images per second that the paper reports: on a GPU in batches, and on a CPU one at a time. Its
# reformer has 4 rounds.
PAPER = {
    "mnist": {"softmax": (0.45, 1 / 72.6), "softmax, KV cache": (7.56, 1 / 7.4),
              "linear": (142.8, 1 / 5.5), "reformer (library)": (0.27, None)},
    "cifar10": {"softmax": (0.004, 1 / 8651), "softmax, KV cache": (0.32, 1 / 71.9),
                "linear": (17.85, 1 / 45.1), "reformer (library)": (0.005, None)},
}  # fmt: skip

# A ratio below this is called no difference.
TIE = 1.05


@dataclass(frozen=True)
class Quantity:
    """What is compared at every length."""

    kind: str  # of records: training or sampling
    key: str  # of their value
    title: str
    better: str  # in words, for the method with the smaller value


QUANTITIES = [
    Quantity("training", "seconds", "training, seconds per step", "trains faster than"),
    Quantity("training", "added_mb", "training, MB per step", "trains with less memory than"),
    Quantity("sampling", "ms_per_byte", "sampling, ms per byte", "samples faster than"),
    Quantity("sampling", "state_mb", "sampling, MB of state", "keeps less state than"),
]


def report(results: dict) -> list[str]:
    """The lines of the report."""
    minutes = f"measured in {results['minutes']:.1f} minutes"
    lines = [f"{results['machine']}, {results['date']}, {minutes}"]
    if results["quick"]:
        lines.append("--quick: tiny models, to see that everything runs; not a comparison")
    if "learning" in results:
        return [*lines, *learning_lines(results["learning"])]
    for quantity in QUANTITIES:
        curves = curves_of(results, quantity)
        lines += ["", *length_table(curves, quantity), "", *crossovers(curves, quantity)]
    for config in results["configs"]:
        lines += ["", *image_table(results, config)]
    lines += ["", "\\* extrapolated from bytes at the beginning, middle and end of an image"]
    return [*lines, "", *byte_cost_lines(results)]


@dataclass(frozen=True)
class Point:
    """A value measured at a length."""

    value: float
    extrapolated: bool

    def __str__(self):
        return number(self.value) + "*" * self.extrapolated


def curves_of(results: dict, quantity: Quantity) -> dict[str, dict[int, Point]]:
    """{method: {length: Point}} for one image at a time, with the layers of the MNIST model."""
    curves = {}
    for record in results[quantity.kind]:
        value = record[quantity.key]
        others = (record.get("config", "mnist"), record.get("batch", 1)) != ("mnist", 1)
        if value is not None and not others:
            extrapolated = quantity.key == "ms_per_byte" and record["extrapolated"]
            curves.setdefault(record["method"], {})[record["length"]] = Point(value, extrapolated)
    return curves


def number(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits, without an exponent."""
    return f"{float(f'{value:.{digits}g}'):,.12g}"


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def length_table(curves: dict, quantity: Quantity) -> list[str]:
    """One row for each length, one column for each method."""
    lengths = sorted({length for points in curves.values() for length in points})
    rows = [
        [f"{length:,}", *(str(points.get(length, "-")) for points in curves.values())]
        for length in lengths
    ]
    return markdown([f"{quantity.title}; bytes per image", *curves], rows)


def crossovers(curves: dict, quantity: Quantity) -> Iterator[str]:
    """One sentence for each method that linear attention is compared with."""
    linear = curves["linear"]
    for name, points in curves.items():
        lengths = sorted(linear.keys() & points)
        if lengths and not name.startswith("linear"):
            ratios = [points[length].value / linear[length].value for length in lengths]
            if 1 / TIE < ratios[-1] < TIE:
                yield f"{quantity.title}: linear is within 5% of {name} at {lengths[-1]:,}"
            else:
                yield f"linear {quantity.better} {name} {where(lengths, ratios)}"


def where(lengths: list[int], ratios: list[float]) -> str:
    """From which length on all ratios are above 1, in words."""
    start, last = crossover(lengths, ratios), f"{lengths[-1]:,}"
    if start is None:
        return f"at no length up to {last} (there the factor is {number(ratios[-1])})"
    words = f"from about L = {number(start, 2)} on"
    if start == lengths[0]:
        words = f"at every length from {start:,} on"
    return f"{words} (by a factor of {number(ratios[-1])} at {last})"


def crossover(lengths: list[int], ratios: list[float]) -> float | None:
    """The length from which all ratios are above 1, interpolated between measured lengths on
    logarithmic axes; None if the last one is not."""
    below = [i for i, ratio in enumerate(ratios) if ratio <= 1]
    if not below:
        return lengths[0]
    i = below[-1]
    if i == len(ratios) - 1:
        return None
    (x, x_next), (y, y_next) = (map(math.log, values[i : i + 2]) for values in (lengths, ratios))
    return math.exp(x - y * (x_next - x) / (y_next - y))


def image_table(results: dict, config: str) -> list[str]:
    """The paper's table: images per second, and how many times as many as softmax attention
    without a cache."""
    measured = rates_of(results, config)
    columns = {
        "paper, GPU": paper_column(config, 0),
        "paper, CPU, batch 1": paper_column(config, 1),
    }
    columns |= {f"here, batch {batch}": points for batch, points in measured.items()}
    rows = [
        [name, *(rate(column.get(name), column.get("softmax")) for column in columns.values())]
        for name in dict.fromkeys(name for points in measured.values() for name in points)
    ]
    return markdown([f"{config}, images per second", *columns], rows)


def rates_of(results: dict, config: str) -> dict[int, dict[str, Point]]:
    """Images per second of a model of the paper: {batch size: {method: Point}}."""
    rates = {}
    for r in results["sampling"]:
        if (r["config"], r["length"]) == (config, results["configs"][config]):
            point = Point(r["images_per_second"], r["extrapolated"])
            rates.setdefault(r["batch"], {})[r["method"]] = point
    return rates


def paper_column(config: str, column: int) -> dict[str, Point]:
    rates = {name: values[column] for name, values in PAPER[config].items()}
    return {name: Point(rate, False) for name, rate in rates.items() if rate}


def rate(point: Point | None, softmax: Point | None) -> str:
    """Images per second, and the ratio to softmax attention."""
    if not (point and softmax):
        return str(point or "-")
    return f"{point} ({number(point.value / softmax.value)}x)"


def byte_cost_lines(results: dict) -> Iterator[str]:
    """The cost of a byte of the long images, relative to that of the short ones."""
    for cost in results["byte_cost"]:
        short, long = cost["lengths"]
        for what, words in (("training", "a training step"), ("sampling", "sampling an image")):
            us_short, us_long = cost[what]
            peaks = [r["process_mb"] for r in results[what] if is_linear(r, long)]
            yield (
                f"linear, {words} of {long:,} bytes: {us_long:.1f} us per byte, "
                f"{us_long / us_short:.2f} times that of {short:,} bytes ({us_short:.1f}); "
                f"peak memory of the whole process {max(peaks) / 1e3:.2f} GB"
            )


def is_linear(record: dict, length: int) -> bool:
    return record["method"] == "linear" and record["length"] == length


def learning_lines(runs: list[dict]) -> list[str]:
    """Bits/dim of each method after equally many images and after equal times."""
    methods = runs_by_method(runs)
    images = max(
        common_images([points for seeds in methods.values() for points in seeds]), default=0
    )
    minutes = min(points[-1]["seconds"] for seeds in methods.values() for points in seeds) / 60
    rows = []
    for name, seeds in methods.items():
        last = [points[-1] for points in seeds]
        seen = mean(point["images"] for point in last)
        rows.append([name, spread(after_images(seeds, images)), spread(last), f"{seen:,.0f}"])
    header = ["test bits/dim", f"after {images:,} images", f"after {minutes:.3g} minutes"]
    return ["", *markdown([*header, "images seen by then"], rows)]


def spread(points: list[dict]) -> str:
    """The mean and the range of the bits/dim of several seeds."""
    bits = [point["bits_per_dim"] for point in points]
    return f"{mean(bits):.3f} ({min(bits):.3f} to {max(bits):.3f})" if bits else "-"
