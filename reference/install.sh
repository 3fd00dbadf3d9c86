#!/bin/sh
# Installs pytorch-fast-transformers 0.4.0 for the Python given as the only argument, which must
# have torch. It builds without isolation, since the library's setup imports torch, and without
# pip's cache, which may hold a wheel built for another torch. It hides nvcc unless torch can use
# it, since the setup compiles for CUDA if it finds an nvcc on the PATH.
set -eu
python=$1

# By default setuptools calls the compiler that Python was built with, even if it is missing.
CC=${CC:-cc} CXX=${CXX:-c++}
export CC CXX
fail() {
    echo "make reference: $1" >&2
    exit 1
}
for compiler in "$CC" "$CXX"; do
    command -v "${compiler%% *}" >/dev/null ||
        fail "no C++ compiler ($compiler): install g++ (macOS: xcode-select --install)"
done
headers='import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")'
"$python" -c "$headers" 2>/dev/null || fail "Python's headers are missing: install python3-dev"

# CUDA kernels are built only if nvcc has torch's CUDA version and still supports the library's
# oldest architecture (CUDA 13 does not).
usable='import shutil, subprocess, torch
def nvcc(*flags):
    return subprocess.run(["nvcc", *flags], capture_output=True, text=True)
old = ["-arch=compute_50", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"]
print(bool(shutil.which("nvcc") and torch.cuda.is_available()
    and f"release {torch.version.cuda}," in nvcc("--version").stdout
    and nvcc(*old).returncode == 0))'

if [ "$("$python" -c "$usable")" = False ]; then
    # A PATH without nvcc: each folder that holds one is replaced by links to its other programs.
    links=$(mktemp -d)
    trap 'rm -rf "$links"' EXIT
    new_path= count=0
    old_ifs=$IFS IFS=:
    for folder in $PATH; do
        if [ -e "$folder/nvcc" ]; then
            count=$((count + 1))
            mkdir "$links/$count"
            ln -s "$folder"/* "$links/$count/"
            rm "$links/$count/nvcc"
            folder=$links/$count
        fi
        new_path=$new_path${new_path:+:}$folder
    done
    IFS=$old_ifs
    PATH=$new_path
    export PATH
    unset CUDA_HOME CUDA_PATH
fi

echo "building pytorch-fast-transformers: about five minutes on two cores"
"$python" -m pip install --quiet --disable-pip-version-check setuptools wheel
"$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-cache-dir \
    --no-deps --force-reinstall pytorch-fast-transformers==0.4.0
"$python" -c "import fast_transformers.causal_product.causal_product_cpu"
