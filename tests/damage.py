"""What can be wrong with a model's folder."""

from pathlib import Path

from safetensors.torch import load_file, save_file


def pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(text)


def cut_off(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def not_finite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


BROKEN = [  # what is said of each
    (pointer, "cannot be loaded"),
    (cut_off, "cannot be loaded"),
    (without_tokenizer, "has no tokenizer"),
    (without_weights, "cannot be loaded"),
    (without_one_weight, "lacks the weights"),
    (not_finite, "layers.1.mlp.up_proj.weight has values that are not finite"),
    (empty, "cannot be loaded"),
]
