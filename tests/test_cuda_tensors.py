"""Every script on a simulated GPU: tensors report device cuda, their data stays on the CPU.

A tensor's storage is marked as CUDA's if it was made there or moved there. Two modes of torch see
every call: `Devices` answers `.device`, `.to(...)` and `device=...`; `Operations` gives marks to
results and notes mixes of devices that CUDA rejects. Left out: resumed runs, random generators.
"""

import importlib
import traceback
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import infra.cli
import infra.models
import infra.run
from infra.cli import parse_args

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
COPYING = {"aten::copy_", "aten::_to_copy", "aten::_foreach_copy_"}


class Marks:
    """The storages that are on CUDA."""

    def __init__(self) -> None:
        # Kept alive, so that no new storage gets the same address
        self.storages: dict[int, Any] = {}
        self.operations: set[str] = set()  # those on CUDA
        self.mixes: list[str] = []

    def note(self, mix: str) -> None:
        """Note a mix with the line of the project that made it."""
        frames = traceback.extract_stack()
        ours = [f for f in frames if ".venv" not in f.filename and f.filename != __file__]
        line = ours[-1]
        self.mixes.append(f"{mix} at {Path(line.filename).name}:{line.lineno}")

    def address(self, tensor: Tensor) -> int:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage().data_ptr()

    def on_cuda(self, tensor: Tensor) -> bool:
        return self.address(tensor) in self.storages

    def mark(self, tensor: Tensor, on_cuda: bool) -> None:
        address = self.address(tensor)
        if on_cuda and address:
            with torch._C.DisableTorchFunction():
                self.storages[address] = tensor.untyped_storage()
        else:
            self.storages.pop(address, None)


def tensors_in(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class Operations(TorchDispatchMode):
    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_dispatch__(self, op: Any, kinds: Any, args: tuple = (), kwargs: Any = None) -> Any:
        marks, name, kwargs = self.marks, op._schema.name, kwargs or {}
        inputs = tensors_in((args, kwargs))
        on_cuda = any(marks.on_cuda(tensor) for tensor in inputs)
        if name in INDEXING:
            on_cuda = self.check_index(name, *args[:3])
        elif name in COPYING:
            on_cuda = name != "aten::_foreach_copy_" and marks.on_cuda(args[0])
        elif on_cuda:
            marks.operations.add(name)
            for tensor in inputs:  # a single number may be on the CPU
                if tensor.dim() and tensor.numel() and not marks.on_cuda(tensor):
                    marks.note(f"{name}: {tuple(tensor.shape)} on the CPU")
        result = op(*args, **kwargs)
        before = {marks.address(tensor) for tensor in inputs}
        for tensor in tensors_in(result):
            if marks.address(tensor) not in before:  # neither a view nor in place
                marks.mark(tensor, on_cuda)
        return result

    def check_index(self, name: str, values: Tensor, index: list, new: Any = None) -> bool:
        """CUDA takes indices from the CPU, but no values. It copies a mask, which is noted too."""
        marks = self.marks
        on_cuda = marks.on_cuda(values)
        for tensor in tensors_in(index):
            if marks.on_cuda(tensor) and not on_cuda:
                marks.note(f"{name}: an index on CUDA, values on the CPU")
            if on_cuda and tensor.dtype is torch.bool and not marks.on_cuda(tensor):
                marks.note(f"{name}: a mask on the CPU")
        if isinstance(new, Tensor) and new.numel() != 1 and marks.on_cuda(new) != on_cuda:
            marks.note(f"{name}: new values on another device")
        return on_cuda


class Devices(TorchFunctionMode):
    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        marks, kwargs = self.marks, dict(kwargs or {})
        if func == Tensor.device.__get__:
            return CUDA if marks.on_cuda(args[0]) else func(*args)
        if func == Tensor.is_cuda.__get__:
            return marks.on_cuda(args[0])
        if func is torch.mm and "out_dtype" in kwargs:  # not on a CPU
            dtype = kwargs.pop("out_dtype")
            return args[0].to(dtype) @ args[1].to(dtype)
        if func in (Tensor.numpy, Tensor.__array__) and marks.on_cuda(args[0]):
            marks.note("numpy: a tensor on CUDA")
        if func is Tensor.cpu:
            return self.move(args[0], CPU)
        if func is Tensor.to:
            return self.to(*args, **kwargs)
        if is_cuda(kwargs.get("device")):  # a new tensor
            result = func(*args, **kwargs | {"device": CPU})
            for tensor in tensors_in(result):
                marks.mark(tensor, True)
            return result
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        # These two create their result in C++, on the device of their input.
        if name in ("new_tensor", "pad_sequence"):
            owner = args[0] if name == "new_tensor" else args[0][0]
            marks.mark(result, marks.on_cuda(owner))
        return result

    def to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`Tensor.to` of a device, a type, both, or another tensor."""
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for value in args:
            if isinstance(value, Tensor):
                device, dtype = CUDA if self.marks.on_cuda(value) else CPU, value.dtype
            elif isinstance(value, str | torch.device):
                device = value
            elif isinstance(value, torch.dtype):
                dtype = value
        if device is not None and torch.device(device).type == "meta":
            return tensor.to("meta")
        tensor = tensor if dtype is None else tensor.to(dtype)
        return tensor if device is None else self.move(tensor, device)

    def move(self, tensor: Tensor, device: Any) -> Tensor:
        if is_cuda(device) == self.marks.on_cuda(tensor):
            return tensor
        moved = tensor.clone()
        self.marks.mark(moved, is_cuda(device))
        return moved


class Autocast(torch.autocast):
    """The CPU's in place of CUDA's, which is off on a machine without a GPU."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)


RUNS = [
    "grpo --group-size 2 --token-budget 40 --dynamic-sampling",
    "grpo --lora-rank 4 --kl 0.1 --gradient-checkpointing",
    "ep_grpo",
    "erpo --updates-per-rollout 2 --importance-cap 2",
    "gtpo --scope batch --overlong-gamma 0.75",
    "gtpo --level sequence",
    "holderpo --clip-level token",
    "arca --lora-dropout 0.1",
    "arca --credit divergence",
    "reft --candidates 8 --mask-opener",
    "forking --updates-per-rollout 2",
    "lambda_grpo --kl 0.1",
    "fipo",
    "stare",
    "vineppo --continuations 2 --overlong-buffer 4",
]


@pytest.mark.parametrize("command", RUNS)
def test_no_step_mixes_devices(command: str, tmp_path, monkeypatch) -> None:
    """Two steps, in which about half of the responses are right."""
    name, *flags = command.split()
    script = importlib.import_module(name)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch, "autocast", Autocast)
    available = types.SimpleNamespace(is_available=lambda: True)
    monkeypatch.setattr(infra.cli, "torch", types.SimpleNamespace(cuda=available))
    monkeypatch.setattr(common, "grade", lambda grader, texts, problems: alternating(texts))
    words = "--engine transformers --device cuda --precision bfloat16 --steps 2 --max-logp-gap 1 "
    words += "--prompts-per-step 4 --group-size 4 --max-new-tokens 10 --eval-every 0 --lr 1e-3 "
    words += f"--eval-problems 1 --eval-samples 1 --run-dir {tmp_path / 'run'}"
    marks, saved_from = Marks(), set()

    def watched(policy: nn.Module, *rest: Any) -> None:
        saved_from.update(weight.device.type for weight in policy.parameters())
        infra.models.save_model(policy, *rest)

    monkeypatch.setattr(infra.run, "save_model", watched)
    args = parse_args(script.Args, [*words.split(), *flags])
    with Devices(marks), Operations(marks):
        script.main(args)
    assert "aten::_fused_adamw_" in marks.operations  # so parameters and gradients are there
    assert saved_from == {"cpu"}  # on a GPU vLLM holds the memory
    assert sorted(set(marks.mixes)) == []


def alternating(texts: list[str]) -> list[bool]:
    """In groups of two the first group has equal verdicts: --dynamic-sampling replaces it."""
    return [i % 2 == 0 or i == 1 for i in range(len(texts))]


def test_mixes_are_found() -> None:
    marks = Marks()
    with Devices(marks), Operations(marks):
        x = torch.zeros(3, device="cuda")
        assert (x + torch.tensor(1.0))[torch.tensor([0, 2])].is_cuda
        assert not x.cpu().is_cuda and x.cpu().to(x).device == CUDA
        assert marks.mixes == []
        x + torch.ones(3)
        x[torch.tensor([True, False, True])]
        x[torch.tensor([0, 2])] = torch.ones(2)
        torch.ones(3)[torch.ones(3, device="cuda").long()]
        torch.where(torch.ones(3, dtype=torch.bool), x, x)
        x.numpy()
    assert [mix.split(": ")[0] for mix in marks.mixes] == [
        "aten::add",
        "aten::index",
        "aten::index_put_",
        "aten::index",
        "aten::where",
        "numpy",
    ]
