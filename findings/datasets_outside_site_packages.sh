#!/usr/bin/env bash
# datasets cannot make a Dataset if it is installed in a folder without "site-packages" in its path.
#
# Behaviour: after `pip install --target FOLDER datasets`, with FOLDER on PYTHONPATH, every
#   Dataset.from_list or from_dict raises PicklingError: Can't pickle <class 'MonthDayNano'>: it's
#   not found as builtins.MonthDayNano. With the same packages in FOLDER/site-packages it works.
# Expected: the same result in both folders; pip and Python give these names no meaning.
# Versions: datasets 5.2.0, dill 0.4.1, pyarrow 26.0.1, Python 3.11.
# Source: datasets/utils/_dill.py hashes a table with dill; dill/_dill.py, _is_builtin_module: a
#   module is pickled by reference if its file is below sys.prefix or has "site-packages" in its
#   path, else by value, with everything in it: here pyarrow, whose class MonthDayNano claims to be
#   in the module builtins.
# Workaround: a target folder named site-packages (Makefile, scale-server-test).
#
# Run without arguments: it installs the packages below into a temporary folder (about 300 MB).
# Exit code: 0 if datasets behaves as described, else 1.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --target "$folder/packages" \
    datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 pyarrow==26.0.1 pandas==3.1.1 numpy==2.3.5 \
    xxhash==4.1.0 fsspec==2026.9.0 huggingface_hub==2.4.0 hf-xet==1.8.0 filelock==4.2.11 \
    packaging==26.3 PyYAML==6.0.3 tqdm==4.70.1 python-dateutil==4.0.0 tzdata==2026.6 \
    httpx2==2.16.2 httpcore2==2.16.2 httpx==0.28.1 httpcore==1.0.9 truststore==0.10.5 h11==0.16.0 \
    anyio==4.16.0 certifi==2026.10.18 idna==3.20 requests==2.34.2 urllib3==2.8.0 six==1.17.0 \
    charset-normalizer==3.5.2 typing_extensions==4.16.0 typer==0.29.2 click==8.5.1 rich==15.0.0 \
    shellingham==1.5.4 Pygments==2.21.0 markdown-it-py==4.3.0 mdurl==0.1.2 annotated-doc==0.0.7

cat > "$folder/make.py" <<'PYTHON'
import importlib.metadata

for name in ("datasets", "dill", "pyarrow"):
    print(name, importlib.metadata.version(name))

from datasets import Dataset

print(Dataset.from_list([{"text": "a"}, {"text": "b"}])["text"][:])
PYTHON
export HF_HUB_OFFLINE=1 HF_HOME="$folder/cache"

echo "in $folder/packages:"
plain=0
PYTHONPATH="$folder/packages" "$folder/venv/bin/python" "$folder/make.py" \
    > "$folder/plain.txt" 2>&1 || plain=$?
grep -E "^[a-z]+ [0-9]" "$folder/plain.txt"
tail -n 1 "$folder/plain.txt"
echo "exit code $plain"

mkdir "$folder/named"
mv "$folder/packages" "$folder/named/site-packages"
echo "in $folder/named/site-packages:"
named=0
PYTHONPATH="$folder/named/site-packages" "$folder/venv/bin/python" "$folder/make.py" \
    > "$folder/named.txt" 2>&1 || named=$?
tail -n 1 "$folder/named.txt"
echo "exit code $named"

message="PicklingError: Can't pickle <class 'MonthDayNano'>"
if [[ $plain == 1 && $named == 0 ]] && grep -q "$message" "$folder/plain.txt"; then
    echo "as described: the name of the folder decides"
else
    echo "the behaviour has changed"
    exit 1
fi
