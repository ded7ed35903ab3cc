#!/usr/bin/env bash
# load_dataset("json") reads the texts of a column as JSON if one value of the column is no text.
#
# Behaviour: if a column has texts and one number, its type is Json, and each text that is JSON is
#   decoded: "007" is 7, "null" is None, "1e5" is 100000.0, "[1, 2]" is a list. Without the number
#   all of them stay texts. After to_parquet, another reader such as pandas finds JSON: the text x
#   is '"x"', in quotes, and 1/2 is '"1\/2"'.
# Expected: a text stays the text that it is in the file, whatever other rows hold, or an error.
# Consequence: one integer among the reference answers of a data set changes other rows' answers,
#   and the answer null is lost. A column exported to Parquet has answers that no response equals.
# Versions: datasets 5.2.0, pyarrow 26.0.1, pandas 3.1.1, Python 3.11.
# Source: datasets/packaged_modules/json/json.py: on_mixed_types is "use_json".
# Workaround: infra/rows.py reads files itself and decodes such columns of saved data sets;
#   tests/test_problems.py, test_a_folder_is_read_like_a_file and
#   test_what_datasets_made_of_a_mixed_column.
#
# Run without arguments: it installs the packages below into a temporary environment (about 300 MB).
# Exit code: 0 if datasets behaves as described, else 1.
set -euo pipefail

PINNED="
    annotated-doc==0.0.7 anyio==4.16.0 certifi==2026.10.18 charset-normalizer==3.5.2
    click==8.5.1 datasets==5.2.0 dill==0.4.1 filelock==4.2.11 fsspec==2026.9.0 h11==0.16.0
    hf-xet==1.8.0 httpcore2==2.16.2 httpcore==1.0.9 httpx2==2.16.2 httpx==0.28.1
    huggingface_hub==2.4.0 idna==3.20 markdown-it-py==4.3.0 mdurl==0.1.2 multiprocess==0.70.19
    numpy==2.3.5 packaging==26.3 pandas==3.1.1 pyarrow==26.0.1 Pygments==2.21.0
    python-dateutil==4.0.0 PyYAML==6.0.3 requests==2.34.2 rich==15.0.0 shellingham==1.5.4
    six==1.17.0 tqdm==4.70.1 truststore==0.10.5 typer==0.29.2 typing_extensions==4.16.0
    tzdata==2026.6 urllib3==2.8.0 xxhash==4.1.0
"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
pip() {
    "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"
}
# shellcheck disable=SC2086
pip $PINNED

cd "$folder"
cat > check.py <<'PYTHON'
import json

import datasets
import pandas
import pyarrow

TEXTS = ["007", "null", "1e5", "[1, 2]", "1/2", "x"]


def load(name, answers):
    with open(name, "w") as file:
        file.writelines(json.dumps({"answer": answer}) + "\n" for answer in answers)
    return datasets.load_dataset("json", data_files=name, split="train")


datasets.disable_progress_bars()
for package in (datasets, pyarrow, pandas):
    print(package.__name__, package.__version__)
alone, mixed = load("texts.jsonl", TEXTS), load("mixed.jsonl", [*TEXTS, 7])
mixed.to_parquet("mixed.parquet")
exported = pandas.read_parquet("mixed.parquet")["answer"].tolist()
print("texts alone: ", alone["answer"][:])
print("and a number:", mixed["answer"][:])
print("in Parquet:  ", exported)

as_described = (
    alone["answer"][:] == TEXTS
    and mixed["answer"][:] == [7, None, 100000.0, [1, 2], "1/2", "x", 7]
    and exported == ["007", "null", "1e5", "[1, 2]", r'"1\/2"', '"x"', "7"]
)

print("as described" if as_described else "CHANGED")
raise SystemExit(not as_described)
PYTHON
export HF_HUB_OFFLINE=1 HF_HOME="$folder/home"
"$folder/venv/bin/python" check.py
