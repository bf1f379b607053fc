#!/bin/sh
# What the image runs. Without arguments: a challenge's container, which fills /output from /input.
set -eu
case "${1-}" in
crossmr | crossmr-bids | crossmr-mercure) exec "$@" ;;
?*) exec crossmr "$@" ;;
esac
if [ -n "${MERCURE_IN_DIR-}" ]; then # the router mercure starts its modules without arguments
    exec crossmr-mercure
fi
if [ ! -d /input ] || [ ! -w /output ]; then
    echo "crossmr: mount the studies at /input and a writable folder at /output, or give a command, such as --help." >&2
    exit 2
fi
# /output holds the synthetic images and nothing else; manifests and report go to /output_records where that is mounted.
if [ -w /output_records ]; then
    exec crossmr complete /input --out /output --profile challenge
fi
place=$(mktemp -d)
ln -s /output "$place/output"
exec crossmr complete /input --out "$place/output" --profile challenge
