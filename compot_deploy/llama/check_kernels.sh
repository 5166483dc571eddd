#!/bin/sh
# Compile and run check_kernels.c: under the address and undefined-behaviour sanitizers on this machine, and for
# AArch64, with and without the dot-product instructions, under qemu-user. Tools that are missing are skipped.
#   usage: compot_deploy/llama/check_kernels.sh [native|neon|neon-dotprod ...]      nothing means all
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
flags="-g -std=c11 -ffp-contract=off -Wall -Wextra -Werror"
sources="$here/check_kernels.c $here/kernels.c $here/leaf.c $here/tiles.c"
failed=0

native() {
    # Sanitizers make -O2 take two minutes to compile and -O1 half a minute; what they look for does not depend on it.
    # A null pointer ends the process by itself; looking for it takes a fifth of the time.
    # shellcheck disable=SC2086
    cc -O0 $flags -fsanitize=address,undefined -fno-sanitize=null -fno-sanitize-recover=all $sources -lm -o "$work/native"
    "$work/native"
}

emulated() { # flags of the processor
    if ! command -v aarch64-linux-gnu-gcc >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
        echo "skipped: needs aarch64-linux-gnu-gcc and qemu-aarch64 (apt: gcc-aarch64-linux-gnu qemu-user)"
        return 0
    fi
    # shellcheck disable=SC2086
    aarch64-linux-gnu-gcc -O2 $flags "$1" -static $sources -lm -o "$work/arm"
    qemu-aarch64 "$work/arm"
}

for what in ${*:-native neon neon-dotprod}; do
    echo "== $what"
    case $what in
    native) native || failed=1 ;;
    neon) emulated -march=armv8-a || failed=1 ;;
    neon-dotprod) emulated -march=armv8.2-a+dotprod || failed=1 ;;
    *) echo "unknown: $what"; failed=1 ;;
    esac
done
exit $failed
