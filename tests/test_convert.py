"""Checkpoints of this project and of others become folders that load, bit for bit, and run nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from command_lines import run
from distributed_runs import on_two_ranks, strategy_options, weights_of
from peft import LoraConfig, PeftModel, get_peft_model
from runs import make_data, make_module, make_trainer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lightning_grpo.checkpoints import Manifest, Sections, open_checkpoint, verify, write_checkpoint
from lightning_grpo.checkpoints.draft import drafting
from lightning_grpo.checkpoints.tensor_file import Shard
from lightning_grpo.importing import LazyTensor, ModelFiles, write_model_folder
from lightning_grpo.importing.lazy import assemble
from lightning_grpo.policy import load_policy
from lightning_grpo.tools.convert import convert

OURS = "policy.model."
HALF = "model.layers.0.mlp.up_proj.weight"


def state_of(folder: str | Path) -> dict[str, Tensor]:
    """What transformers loads from a folder."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return dict(model.state_dict())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture
def drawn(char_model: str) -> dict[str, Tensor]:
    """Weights that are in no folder, of the shapes of the small model; its head is tied."""
    generator = torch.Generator().manual_seed(5)
    shapes = {n: t.shape for n, t in load_file(f"{char_model}/model.safetensors").items()}
    weights = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    return weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}


def prefixed(weights: dict[str, Tensor], prefix: str = OURS) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def write_ours(path: str, weights: dict[str, Tensor]) -> None:
    moments = {HALF: {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}}
    optimizer = {"state": moments, "param_groups": [{"params": [HALF], "lr": 0.1}]}
    state = {"global_step": 50, "loops": {"ranks": (torch.arange(3), None)}}
    sections = Sections(state, weights, [optimizer])
    kind = Path(path).name.partition("-")[0]
    write_checkpoint(path, sections, Manifest(kind, 50, 7, {}, world_size=2))


def write_ours_sharded(path: str, weights: dict[str, Tensor]) -> None:
    """As two ranks write it: each the rows that it has."""
    text, tensors = Sections({"global_step": 50}, weights, []).encode()
    with drafting(path) as draft:
        for rank in range(2):
            parts, shards = {}, {}
            for name, tensor in tensors["weights"].items():
                begin = len(tensor) // 2 if rank else 0
                parts[name] = tensor[begin:] if rank else tensor[: len(tensor) // 2]
                shards[name] = Shard(tuple(tensor.shape), (begin, *[0] * (tensor.dim() - 1)))
            draft.add_tensors(f"weights-0000{rank}-of-00002.safetensors", parts, shards)
        draft.add_bytes("state.json", text)
        draft.commit(Manifest("last", 50, 7, {}, world_size=2))


def write_run_config(folder: str, **model: Any) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "config.yaml").write_text(yaml.safe_dump({"model": model}))


@pytest.mark.parametrize("write", [write_ours, write_ours_sharded])
def test_a_run_starts_from_the_folder_of_a_checkpoint(char_model, drawn, write, capsys):
    write("run/checkpoints/last-000050", prefixed(drawn) | {"critic.head.bias": torch.ones(2)})
    write_run_config("run", name_or_path=char_model, lora=None)
    run("convert", "run/checkpoints/last", "--out", "out", "--max_shard_gb", "2e-5")
    assert "1 other tensors left out" in capsys.readouterr().out
    assert len(list(Path("out").glob("*.safetensors"))) > 2
    policy = load_policy("out", num_tokens=len(AutoTokenizer.from_pretrained("out")))
    assert_same(dict(policy.causal_lm.state_dict()), drawn)


@pytest.mark.parametrize("write", [write_ours, write_ours_sharded])
def test_a_checkpoint_is_written_again_as_one_of_whole_tensors(drawn, write):
    write("run/checkpoints/last-000050", prefixed(drawn))
    convert("run/checkpoints/last-000050", "other/last-000050", to="checkpoint")
    before = open_checkpoint("run/checkpoints/last-000050")
    after = open_checkpoint("other/last-000050")
    assert not verify(after) and "weights.safetensors" in after.manifest.files
    assert (after.manifest.step, after.manifest.kind, after.manifest.world_size) == (50, "last", 2)
    assert_same(dict(after.read_weights()), prefixed(drawn))
    assert after.read_state()["global_step"] == 50
    if write is write_ours:
        old, new = before.read_all(), after.read_all()
        assert str(new.optimizers) == str(old.optimizers) and str(new.state) == str(old.state)


def test_a_trainers_folder_loses_its_pickles_and_keeps_its_weights(char_model, drawn):
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        Path("trl").mkdir(exist_ok=True)
        shutil.copy(f"{char_model}/{name}", f"trl/{name}")
    torch.save(drawn, "trl/pytorch_model.bin")
    for name in ("optimizer.pt", "training_args.bin"):
        Path("trl", name).write_bytes(b"no file of torch")
    convert("trl", "out", dtype="bfloat16")
    assert not {p.suffix for p in Path("out").iterdir()} & {".bin", ".pt"}
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "bfloat16"
    halves = {n: t.bfloat16() for n, t in drawn.items()}
    assert_same(state_of("out"), halves)
    halves.pop("lm_head.weight")
    assert_same(load_file("out/model.safetensors"), halves)
    assert AutoTokenizer.from_pretrained("out")("12=")["input_ids"] == [4, 5, 13]


def test_a_folder_whose_names_are_older_than_the_model_is_taken_as_transformers_takes_it():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=11, n_positions=8))
    model.save_pretrained("gpt2")
    weights = load_file("gpt2/model.safetensors")
    bare = {n.removeprefix("transformer."): t for n, t in weights.items()}
    save_file(bare, "gpt2/model.safetensors", metadata={"format": "pt"})
    convert("gpt2", "out")
    assert_same(state_of("out"), dict(model.state_dict()))


def lora_model(folder: str, rank: int = 2, **options: Any) -> PeftModel:
    config = LoraConfig(r=rank, lora_alpha=6, task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model  # type: ignore[return-value]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"], "alpha_pattern": {"down_proj": 3}},
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 4}},
    ],
)
def test_an_adapter_is_merged_as_peft_merges_it(char_model, options):
    model = lora_model(char_model, **options)
    model.save_pretrained("adapter")
    convert("adapter", "out", base=char_model)
    assert_same(state_of("out"), dict(model.merge_and_unload().state_dict()))


def test_an_adapter_of_transposed_layers_is_merged_as_peft_merges_it():
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=11, n_positions=8)
    GPT2LMHeadModel(config).save_pretrained("gpt2")
    model = lora_model("gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model.save_pretrained("adapter")
    convert("adapter", "out", base="gpt2")
    assert_same(state_of("out"), dict(model.merge_and_unload().state_dict()))


def test_a_lora_run_becomes_an_adapter_of_peft_and_a_merged_model(char_model):
    model = lora_model(char_model, target_modules="all-linear")
    adapters = {n: t for n, t in model.state_dict().items() if ".lora_" in n}
    critic = {n.replace(".default.", ".critic."): t + 1 for n, t in adapters.items()}
    write_ours("run/checkpoints/best-000050", prefixed({**critic, **adapters}))
    write_run_config("run", name_or_path=char_model, lora={"rank": 2, "alpha": 6.0})
    convert("run/checkpoints/best", "adapter", to="peft")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(char_model), "adapter")
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    convert("run/checkpoints/best", "out")
    assert_same(state_of("out"), dict(model.merge_and_unload().state_dict()))
    write_run_config("run", name_or_path=char_model, lora=None)
    with pytest.raises(ValueError, match="--lora_alpha"):
        convert("run/checkpoints/best", "never")


def write_on_two_ranks(model: str, folder: str) -> dict[str, Tensor]:
    """One run under FSDP2, saved as Lightning, FSDP1, and verl under either would save it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed._shard import sharded_tensor

    module = make_module(model)
    trainer = make_trainer(max_epochs=-1, max_steps=1, **strategy_options("fsdp2"))
    trainer.fit(module, make_data())
    trainer.save_checkpoint(f"{folder}/fsdp2")
    rank = dist.get_rank()
    sharded = {n.removeprefix(OURS): t for n, t in module.state_dict().items()}
    whole = weights_of(module)
    torch.save(sharded, f"{folder}/verl_fsdp2/model_world_size_2_rank_{rank}.pt")
    flat = {}
    for name, tensor in sharded.items():
        local = tensor.to_local().detach()
        begin = -(-len(tensor) // 2) * rank
        offsets = [begin, *[0] * (local.dim() - 1)]
        shard = sharded_tensor.Shard.from_tensor_and_offsets(local, offsets, rank)
        flat[name] = sharded_tensor.init_from_local_shards([shard] * bool(len(local)), tensor.shape)
    torch.save(flat, f"{folder}/verl_fsdp1/model_world_size_2_rank_{rank}.pt")
    moments = {f"{name}.exp_avg": tensor for name, tensor in flat.items()}
    dcp.save({"model": flat, "optimizer_0": moments}, checkpoint_id=f"{folder}/fsdp1")
    return {n.removeprefix(OURS.removeprefix("policy.")): t for n, t in whole.items()}


@pytest.fixture(scope="module")
def of_two_ranks(char_model, tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("two_ranks")
    for name in ("verl_fsdp1", "verl_fsdp2"):
        (folder / name).mkdir()
        shutil.copytree(char_model, folder / name / "huggingface")
        (folder / name / "huggingface/model.safetensors").unlink()
    first, second = on_two_ranks(write_on_two_ranks, folder, char_model, str(folder), start="fork")
    assert not isinstance(first, str), first
    assert not isinstance(second, str), second
    return folder, first | {"lm_head.weight": first["model.embed_tokens.weight"]}


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2", "verl_fsdp1", "verl_fsdp2"])
def test_what_two_ranks_have_written_is_whole_again(char_model, of_two_ranks, kind):
    folder, weights = of_two_ranks
    convert(str(folder / kind), "out", like=None if "verl" in kind else char_model)
    assert_same(state_of("out"), weights)
    assert float((weights[HALF] - state_of(char_model)[HALF]).abs().max()) > 0


def test_what_ranks_have_saved_from_gpus_is_read_without_one(of_two_ranks):
    folder, weights = of_two_ranks
    shutil.copytree(folder / "verl_fsdp2", "gpu")
    for path in Path("gpu").glob("*.pt"):
        on_cpu, on_gpu = (b"X" + len(d).to_bytes(4, "little") + d for d in (b"cpu", b"cuda:0"))
        path.write_bytes(replace_in_zip(path, lambda p, a=on_cpu, b=on_gpu: p.replace(a, b)))
    convert("gpu", "out")
    assert_same(state_of("out"), weights)


def test_a_rank_that_is_missing_is_named(of_two_ranks, char_model):
    shutil.copytree(of_two_ranks[0], "copy")
    Path("copy/verl_fsdp2/model_world_size_2_rank_1.pt").unlink()
    with pytest.raises(ValueError, match=r"lacks the files of the ranks \[1\]"):
        convert("copy/verl_fsdp2", "out")
    Path("copy/fsdp2/__1_0.distcp").unlink()
    with pytest.raises(ValueError, match=r"__1_0\.distcp is missing"):
        convert("copy/fsdp2", "out", like=char_model)


def test_copies_among_sharded_ranks_are_put_together_by_the_mesh(char_model, drawn, tmp_path):
    """Four ranks, 2 copies x 2 shards, along the second dimension for one tensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as Along
    from torch.testing._internal.distributed.fake_pg import FakeStore

    shutil.copytree(char_model, "verl/huggingface")
    for rank in range(4):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ddp", "fsdp"))
        state = {}
        for name, tensor in drawn.items():
            dim = 1 if name == HALF else 0
            local = list(tensor.chunk(2, dim)) + [tensor[:0]]
            state[name] = DTensor.from_local(
                local[rank % 2].clone(),
                mesh,
                [Replicate(), Along(dim)],
                run_check=False,
                shape=tensor.shape,
                stride=tensor.stride(),
            )
        torch.save(state, f"verl/model_world_size_4_rank_{rank}.pt")
        dist.destroy_process_group()
    convert("verl", "out")
    assert_same(state_of("out"), drawn)


def test_a_file_of_lightning_is_read_under_any_prefix(char_model, drawn):
    content = {"pytorch-lightning_version": "2.6.6", "epoch": 1}
    state = prefixed(drawn, "net.lm._orig_mod.") | {"head.bias": torch.ones(3)}
    torch.save(content | {"state_dict": state}, "a.ckpt")
    convert("a.ckpt", "out", like=char_model)
    assert_same(state_of("out"), drawn)
    other = {n: t + 1 for n, t in drawn.items()}
    torch.save(content | {"state_dict": state | prefixed(other, "ref.")}, "b.ckpt")
    with pytest.raises(ValueError, match=r"several models .*'net\.lm\.', 'ref\.'.*--prefix"):
        convert("b.ckpt", "never", like=char_model)
    convert("b.ckpt", "ref", like=char_model, prefix="ref.")
    assert_same(state_of("ref"), other)


def test_a_whole_model_with_adapters_inside_is_merged(char_model):
    model = lora_model(char_model, target_modules=["q_proj", "o_proj"])
    state = dict(model.state_dict())
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight" in state
    torch.save(state, "a.pt")
    convert("a.pt", "out", like=char_model, lora_alpha=6)
    assert_same(state_of("out"), dict(model.merge_and_unload().state_dict()))


def test_experts_are_written_one_by_one_as_transformers_writes_them():
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    experts = {"num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 4}
    config = Qwen3MoeConfig(**sizes, **experts, num_hidden_layers=2, vocab_size=11)
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained("saved")
    torch.save(prefixed(dict(model.state_dict())), "a.pt")
    convert("a.pt", "out", like="saved")
    assert_same(load_file("out/model.safetensors"), load_file("saved/model.safetensors"))
    convert("saved", "again")
    assert_same(state_of("again"), dict(model.state_dict()))


def test_parts_that_leave_a_gap_or_do_not_fit_are_refused():
    whole = torch.arange(12.0).reshape(4, 3)
    boxes = [((0, 0), whole[:2]), ((2, 0), whole[2:, :1]), ((2, 1), whole[2:, 1:])]
    assert torch.equal(assemble("w", torch.float32, (4, 3), [*boxes, boxes[0]]), whole)
    with pytest.raises(ValueError, match="w: its parts hold 8 elements of 12"):
        assemble("w", torch.float32, (4, 3), boxes[:2])
    for offsets, part in [((3, 0), whole[:2]), ((0, 0), whole[:2].half()), ((0,), whole[0])]:
        with pytest.raises(ValueError, match="does not fit"):
            assemble("w", torch.float32, (4, 3), [*boxes[1:], (offsets, part)])


def test_nothing_is_left_of_a_folder_that_could_not_be_written(char_model, drawn):
    def fail() -> Tensor:
        raise OSError(28, "No space left on device")

    weights = {n: LazyTensor(t.dtype, tuple(t.shape), t.clone) for n, t in drawn.items()}
    weights[HALF] = LazyTensor(torch.float32, tuple(drawn[HALF].shape), fail)
    files = ModelFiles(Path(char_model), Path(char_model))
    with pytest.raises(OSError, match="No space left"):
        write_model_folder(weights, files, Path("out"), class_name="Qwen2ForCausalLM")
    assert not os.listdir()


def test_wrong_tensors_are_named(char_model, drawn):
    def refused(weights: dict[str, Tensor], match: str) -> None:
        torch.save(prefixed(weights, "m."), "a.ckpt")
        with pytest.raises(ValueError, match=match):
            convert("a.ckpt", "out", like=char_model)
        assert not Path("out").exists()

    refused({n: t for n, t in drawn.items() if n != HALF}, f"missing {HALF}; too many none")
    refused(drawn | {"model.extra": torch.ones(1)}, r"missing none; too many model\.extra")
    refused(drawn | {HALF: torch.ones(3, 3)}, rf"{HALF} has the shape \(3, 3\)")
    refused(drawn | {"lm_head.weight": drawn["lm_head.weight"] + 1}, "are tied .* and differ")
    refused({"other.weight": torch.ones(2)}, r"no name .* begin with m\.other")


def test_a_dry_run_and_a_folder_that_is_there_change_nothing(char_model, capsys):
    convert(char_model, "out", dry_run=True)
    assert "would write out: 26 tensors" in capsys.readouterr().out
    assert not Path("out").exists()
    Path("out").mkdir()
    Path("out/precious").touch()
    with pytest.raises(ValueError, match="is there already"):
        convert(char_model, "out")
    assert os.listdir("out") == ["precious"]
    with pytest.raises(ValueError, match="goes on from its own checkpoints only"):
        convert(char_model, "new", to="checkpoint")
    with pytest.raises(ValueError, match="no such file or folder"):
        convert("nowhere", "new")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, how: str = "os") -> None:
        self.how = how

    def __reduce__(self) -> Any:
        if self.how == "os":
            return os.system, ("touch sentinel",)
        return eval, ("open('sentinel', 'w')",)


def replace_in_zip(path: Path, change: Callable[[bytes], bytes]) -> bytes:
    """A file of torch.save with its pickle changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return out.getvalue()


@pytest.mark.parametrize("how", ["os", "eval"])
@pytest.mark.parametrize(
    "file",
    [
        *("a.ckpt", "legacy.ckpt", "model/pytorch_model.bin", "adapter/adapter_model.bin"),
        *("verl/model_world_size_1_rank_0.pt", "dcp/.metadata", "dcp/__0_0.distcp"),
    ],
)
def test_a_payload_in_any_file_is_refused_and_not_run(char_model, drawn, file, how):
    import torch.distributed.checkpoint as dcp

    path = Path(file)
    path.parent.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(f"{char_model}/{name}", path.parent)
    if file.startswith("adapter"):
        lora_model(char_model).save_pretrained("adapter")
        Path("adapter/adapter_model.safetensors").unlink()
    if file.startswith("dcp"):
        dcp.save({"model": drawn}, checkpoint_id="dcp", no_dist=True)
    poisoned = {**drawn, "x": Payload(how)}
    if file == "legacy.ckpt":
        torch.save(poisoned, file, _use_new_zipfile_serialization=False)
    elif file == "dcp/.metadata":
        metadata = pickle.loads(path.read_bytes())
        metadata.planner_data = Payload(how)
        path.write_bytes(pickle.dumps(metadata))
    elif file == "dcp/__0_0.distcp":
        start = path.read_bytes()
        torch.save(poisoned, "whole.pt")
        small = io.BytesIO()
        torch.save(Payload(how), small)
        path.write_bytes(small.getvalue().ljust(len(start), b"\0"))
        metadata = pickle.loads(Path("dcp/.metadata").read_bytes())
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, len(small.getvalue())
        Path("dcp/.metadata").write_bytes(pickle.dumps(metadata))
    else:
        torch.save(poisoned, file)
    source = file if file.endswith(".ckpt") else str(path.parent)
    with pytest.raises(ValueError, match=r"is not read|not a file of torch"):
        convert(source, "out", like=char_model, base=char_model)
    assert not Path("sentinel").exists() and not Path("out").exists()
    assert not list(Path().glob(".tmp-*"))


@pytest.mark.parametrize("module", ["builtins", "torch", "functools", "torch.serialization"])
def test_the_metadata_of_a_sharded_folder_can_name_nothing_else(module, tmp_path):
    from lightning_grpo.importing.dcp import read_metadata

    name = {"builtins": "exec", "torch": "load", "functools": "partial"}.get(module, "load")
    code = f'c{module}\n{name}\n(S\'open("sentinel","w")\'\ntR.'.encode()
    Path(".metadata").write_bytes(code)
    with pytest.raises(ValueError, match=f"names {module}.{name}, which no checkpoint needs"):
        read_metadata(Path())
    # What is allowed stands for nothing: the attribute of a class is not got.
    Path(".metadata").write_bytes(b"cbuiltins\ngetattr\n(ctorch\nSize\nS'__subclasses__'\ntR.")
    with pytest.raises(ValueError, match="does not say where the tensors are"):
        read_metadata(Path())
    assert not Path("sentinel").exists()


def test_names_that_lead_out_of_a_folder_are_refused(char_model, drawn):
    import torch.distributed.checkpoint as dcp

    shutil.copytree(char_model, "inside/model")
    shutil.move("inside/model/model.safetensors", "inside/outside.safetensors")
    index = {"weight_map": dict.fromkeys(drawn, "../outside.safetensors")}
    Path("inside/model/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names the file '\.\./outside\.safetensors'"):
        convert("inside/model", "out")
    dcp.save({"model": drawn}, checkpoint_id="inside/dcp", no_dist=True)
    shutil.move("inside/dcp/__0_0.distcp", "inside/away.distcp")
    metadata = pickle.loads(Path("inside/dcp/.metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../away.distcp"
    Path("inside/dcp/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"names the file '\.\./away\.distcp'"):
        convert("inside/dcp", "out", like=char_model)


def test_code_in_a_model_folder_is_neither_run_nor_passed_on(char_model):
    shutil.copytree(char_model, "model")
    Path("model/evil.py").write_text("open('sentinel', 'w')\nclass Config: ...\nclass Model: ...\n")
    config = json.loads(Path("model/config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    Path("model/config.json").write_text(json.dumps(config))
    convert("model", "out")
    assert "auto_map" not in json.loads(Path("out/config.json").read_text())
    assert not Path("out/evil.py").exists()
    Path("model/config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(ValueError, match="code of a model's folder is not run"):
        convert("model", "never")
    assert not Path("sentinel").exists()
