#!/usr/bin/env bash
# Builds and checks what is released: bash packaging/release.sh FOLDER
#   FOLDER/packages         wheel and sdist, from the last commit; built twice, in other places, and equal byte for byte
#   FOLDER/crossmr.cdx.json SBOM (CycloneDX) of an environment with the wheel and every extra
#   FOLDER/licences.md      the licence of each package of it, and of those that the tests need; goes to docs/
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:?name a folder for the release}")
rm -rf "$folder/packages"
mkdir -p "$folder"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH PIP_DISABLE_PIP_VERSION_CHECK=1

python3 -m venv "$scratch/tools"
tools=$scratch/tools/bin
"$tools/pip" install --quiet --requirement packaging/release-requirements.txt
build() { # PLACE UMASK ZONE
    mkdir -p "$scratch/$1"
    git archive HEAD | tar -x -C "$scratch/$1"
    (umask "$2" && TZ=$3 "$tools/python" -m build --no-isolation --outdir "$scratch/$1-packages" "$scratch/$1" >/dev/null)
}
build one 022 UTC
build another/place 077 Asia/Tokyo
diff -r "$scratch/one-packages" "$scratch/another/place-packages"
mv "$scratch/one-packages" "$folder/packages"
wheel=$(echo "$folder"/packages/*.whl)
"$tools/twine" check --strict "$folder"/packages/*
"$tools/check-wheel-contents" "$wheel"

extras=$("$tools/python" -c 'import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*(extra for extra in project["optional-dependencies"] if extra != "dev"), sep=",")')
python3 -m venv "$scratch/all"
"$scratch/all/bin/pip" install --quiet "$wheel[$extras]"
"$tools/cyclonedx-py" environment --pyproject pyproject.toml --output-reproducible --of JSON -o "$folder/crossmr.cdx.json" "$scratch/all"
licences() { # of every package in the environment but crossmr's own
    "$tools/pip-licenses" --python "$scratch/all/bin/python" --from mixed --format json --ignore-packages crossmr pip setuptools
}
licences >"$scratch/run.json"
"$scratch/all/bin/pip" install --quiet "$wheel[dev]"
licences >"$scratch/all.json"
"$tools/python" packaging/licences.py "$scratch/run.json" "$scratch/all.json" >"$folder/licences.md"
(cd "$folder" && sha256sum packages/* crossmr.cdx.json | tee SHA256SUMS)
