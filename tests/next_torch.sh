#!/usr/bin/env bash
# Do all tests pass with another version of torch? tests/next_torch.sh 2.15.0
# What CI does, on a clone that asks for this version.
set -euo pipefail
cd "$(dirname "$0")/.."
clone=$(mktemp -d)
trap 'rm -rf "$clone"' EXIT
git clone -q . "$clone"
cd "$clone"
sed -i "s/\"torch[=>][^\"]*\"/\"torch==${1:?which version of torch?}\"/" pyproject.toml .ci/run
grep -H '"torch==' pyproject.toml .ci/run
bash .ci/run
