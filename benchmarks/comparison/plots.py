"""The figures of the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.comparison.learning import after_images, common_images, runs_by_method
from benchmarks.comparison.report import QUANTITIES, curves_of, number, rates_of
from engine.figures import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "softmax": "tab:red", "softmax, KV cache": "tab:orange", "linear": "tab:blue",
    "gated linear": "tab:purple", "gated delta": "tab:brown",
    "linear (library)": "tab:cyan", "reformer (library)": "tab:green",
}  # fmt: skip


def draw(results: dict, path: str | Path) -> None:
    """Write the figure of the results to a file with one of the extensions of engine/figures.py."""
    figure = learning_figure(results) if "learning" in results else speed_figure(results)
    save_figure(figure, path)


def speed_figure(results: dict) -> Figure:
    """Time and memory against the bytes of an image, on logarithmic axes, and images/s."""
    figure = new_figure(figsize=(13, 7), layout="constrained")
    rows = figure.subplots(2, 3)
    for axes, quantity in zip(rows[:, :2].T.flat, QUANTITIES, strict=True):
        draw_lengths(axes, curves_of(results, quantity), quantity.title)
    for axes, config in zip(rows[:, 2], results["configs"], strict=True):
        draw_rates(axes, results, config)
    handles, names = rows[0, 1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    hollow = "hollow points and hatched bars are extrapolated"
    figure.suptitle(f"{results['machine']}, {results['date']}; {hollow}", fontsize=9)
    return figure


def draw_lengths(axes, curves, title):
    for name, points in curves.items():
        lengths = sorted(points)
        style = {"color": COLOURS[name], "linestyle": "--" if "(library)" in name else "-"}
        axes.plot(lengths, [points[n].value for n in lengths], **style, label=name)
        for n in lengths:
            fill = "white" if points[n].extrapolated else COLOURS[name]
            axes.plot(n, points[n].value, "o", color=COLOURS[name], markerfacecolor=fill, ms=5)
    axes.set(xscale="log", yscale="log", title=title, xlabel="bytes per image")
    ticks = sorted({length for points in curves.values() for length in points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.grid(alpha=0.3)


def draw_rates(axes, results, config):
    """A bar for each method and batch size."""
    rates = rates_of(results, config)
    for name, colour in COLOURS.items():
        for batch_size, points in rates.items():
            if point := points.get(name):
                hatch = "///" if point.extrapolated else None
                style = {"color": colour, "hatch": hatch, "edgecolor": "white"}
                bar = axes.barh(f"{name}, batch {batch_size}", point.value, **style)
                axes.bar_label(bar, fmt=number, padding=2, fontsize=8)
    axes.set(xscale="log", title=f"{config}, images per second")
    axes.margins(x=0.2)
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()


def learning_figure(results: dict) -> Figure:
    """Bits/dim against images and minutes: the mean of the seeds, and their range."""
    figure = new_figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name, runs in runs_by_method(results["learning"]).items():
        points = [after_images(runs, images) for images in common_images(runs)]
        points.append([evaluations[-1] for evaluations in runs])
        bits = [[point["bits_per_dim"] for point in seeds] for seeds in points]
        means = [sum(values) / len(values) for values in bits]
        for axes, key, unit in zip(panels, ("images", "seconds"), (1, 60), strict=True):
            x = [sum(point[key] for point in seeds) / len(seeds) / unit for seeds in points]
            axes.plot(x, means, "o-", markersize=3, color=COLOURS[name], label=name)
            low, high = zip(*((min(values), max(values)) for values in bits), strict=True)
            axes.fill_between(x, low, high, color=COLOURS[name], alpha=0.25, linewidth=0)
    panels[0].set(xscale="log", xlabel="training images", ylabel="test bits/dim")
    panels[1].set(xscale="log", xlabel="minutes of training")
    for axes in panels:
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.grid(alpha=0.3)
    panels[1].legend()
    figure.suptitle(f"{results['machine']}, {results['date']}", fontsize=9)
    return figure
