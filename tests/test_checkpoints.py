"""Checkpoints: which are meant, in which order, what identifies them, and their weights without running their code."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gradscale.checkpoints import Checkpoint, fingerprint, load_state_dict, resolve
from gradscale.errors import GradscaleError

pytestmark = pytest.mark.filterwarnings("error")

WEIGHTS = {"0.weight": torch.arange(6.0).reshape(2, 3), "0.bias": torch.tensor([1.0, -1.0])}

# Run where DeepSpeed can be imported: writes what DeepSpeed 0.19 writes beside the weights.
DEEPSPEED_WRITER = """
import sys, torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
weights = {"0.weight": torch.arange(6.0).reshape(2, 3), "0.bias": torch.tensor([1.0, -1.0])}
scaler = DynamicLossScaler(65536.0, 1000, 1.0, 2, False)
optimizer = {"loss_scaler": LossScaler(1.0), "dynamic": scaler, "zero_stage": ZeroStageEnum.gradients,
             "param_slice_mappings": [{"0.weight": fragment_address(6, 0)}]}
torch.save({"module": weights, "optimizer": optimizer, "ds_config": {"zero_optimization": {"stage": 2}},
            "ds_version": "0.19.8", "param_shapes": [{"0.weight": torch.Size([2, 3])}]}, sys.argv[1])
"""


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"content")


def assert_same(found: dict[str, Tensor]) -> None:
    assert list(found) == list(WEIGHTS) or sorted(found) == sorted(WEIGHTS)
    assert all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


class TestResolve:
    def test_none_is_step_0_without_a_path(self) -> None:
        assert resolve(None) == (Checkpoint(0, None),)

    @pytest.mark.parametrize(
        ("name", "step"),
        [
            ("global_step100", 100),
            ("checkpoint-250", 250),
            ("step=00000100", 100),
            ("model_100.safetensors", 100),
            ("epoch=3-step=12.ckpt", 12),
            ("checkpoint-7/pytorch_model.bin", 7),
            ("global_step9/mp_rank_00_model_states.pt", 9),
            ("run3/final.pt", 0),
            ("final", 0),
            ("checkpoint-7/final", 0),
        ],
    )
    def test_step_of_a_name(self, tmp_path: Path, name: str, step: int) -> None:
        path = tmp_path / name
        if path.suffix and "=" not in path.suffix:
            touch(tmp_path, name)
        else:
            path.mkdir(parents=True)
        assert resolve([str(path)]) == (Checkpoint(step, str(path)),)

    def test_sorted_by_step_as_numbers(self, tmp_path: Path) -> None:
        touch(tmp_path, "w_10.pt", "w_9.pt", "w_100.pt")
        assert [c.step for c in resolve([f"{tmp_path}/w_*.pt"])] == [9, 10, 100]
        assert resolve(str(tmp_path / "w_9.pt"))[0].step == 9

    def test_names_without_steps_keep_their_order(self, tmp_path: Path) -> None:
        touch(tmp_path, "late.pt", "early.pt")
        paths = [str(tmp_path / "late.pt"), str(tmp_path / "early.pt")]
        assert resolve(paths) == (Checkpoint(0, paths[0]), Checkpoint(1, paths[1]))

    def test_mapping(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.pt", "b.pt")
        a, b = str(tmp_path / "a.pt"), str(tmp_path / "b.pt")
        assert resolve({7: a, 3: b}) == (Checkpoint(3, b), Checkpoint(7, a))

    def test_deepspeed_root_stands_for_its_tags(self, tmp_path: Path) -> None:
        touch(tmp_path, "latest", "zero_to_fp32.py", "global_step20/zero_pp_rank_0_mp_rank_00_model_states.pt")
        touch(tmp_path, "global_step3/mp_rank_00_model_states.pt", "tag100/mp_rank_00_model_states.pt", "logs1/x")
        found = resolve([str(tmp_path)])
        assert [(c.step, Path(str(c.path)).name) for c in found] == [
            (3, "global_step3"),
            (20, "global_step20"),
            (100, "tag100"),
        ]

    def test_trainer_folder_stands_for_its_checkpoints(self, tmp_path: Path) -> None:
        touch(tmp_path, "model.safetensors", "config.json", "checkpoint-50/model.safetensors", "checkpoint-best/x")
        touch(tmp_path, "checkpoint-50/global_step50/mp_rank_00_model_states.pt")  # the Trainer under DeepSpeed
        touch(tmp_path, "checkpoint-100/global_step100/mp_rank_00_model_states.pt")
        assert resolve([str(tmp_path)]) == (
            Checkpoint(50, str(tmp_path / "checkpoint-50")),
            Checkpoint(100, str(tmp_path / "checkpoint-100/global_step100")),
        )

    def test_uris_are_not_checked(self) -> None:
        assert resolve(["s3://b/run/step=20/", "gs://b/step10"]) == (
            Checkpoint(10, "gs://b/step10"),
            Checkpoint(20, "s3://b/run/step=20/"),
        )

    @pytest.mark.parametrize("name", ["missing.pt", "global_step*"])
    def test_missing(self, tmp_path: Path, name: str) -> None:
        message = f"checkpoint must be an existing path, got {re.escape(str(tmp_path / name))}; check it"
        with pytest.raises(GradscaleError, match=message):
            resolve([str(tmp_path / name)])

    def test_missing_in_a_mapping(self) -> None:
        with pytest.raises(GradscaleError, match="checkpoint must be an existing path, got nowhere; check it"):
            resolve({1: "nowhere"})

    def test_same_step_twice(self, tmp_path: Path) -> None:
        touch(tmp_path, "a_1.pt", "b_1.pt")
        with pytest.raises(GradscaleError, match=r"different steps, got step 1 for .*a_1\.pt and .*b_1\.pt; leave"):
            resolve([f"{tmp_path}/*.pt"])

    def test_steps_in_some_names_only(self, tmp_path: Path) -> None:
        touch(tmp_path, "a_1.pt", "final.pt")
        with pytest.raises(GradscaleError, match=r"end in their step or none of them, got none in .*final\.pt; leave"):
            resolve([f"{tmp_path}/*.pt"])

    def test_none_named(self) -> None:
        with pytest.raises(GradscaleError, match="checkpoints must name at least one checkpoint, got none"):
            resolve([])


class TestFingerprint:
    def test_depends_on_names_and_content_below_and_not_on_where(self, tmp_path: Path) -> None:
        touch(tmp_path, "a/x/w.pt", "a/c.json", "b/x/w.pt", "b/c.json", "c/y/w.pt", "c/c.json", "d/x/w.pt")
        prints = [fingerprint(str(tmp_path / name)) for name in "abcd"]
        assert prints[0] == prints[1]
        assert len(set(prints)) == 3

    @pytest.mark.parametrize("position", [0, 1 << 20, (3 << 20) - 1])
    def test_depends_on_the_ends_of_a_large_file(self, tmp_path: Path, position: int) -> None:
        content = bytearray(3 << 20)
        (tmp_path / "w.pt").write_bytes(content)
        before = fingerprint(str(tmp_path / "w.pt"))
        content[position] = 1
        (tmp_path / "w.pt").write_bytes(content)
        assert (fingerprint(str(tmp_path / "w.pt")) != before) == (position != 1 << 20)  # the middle is not read

    def test_uri_is_its_own(self) -> None:
        assert fingerprint("s3://bucket/w") == "s3://bucket/w"

    def test_missing(self) -> None:
        with pytest.raises(GradscaleError, match="checkpoint must be an existing path, got nowhere"):
            fingerprint("nowhere")


class TestLoad:
    @pytest.mark.parametrize("key", [None, "module", "model", "state_dict", "model_state_dict"])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_torch_file(self, tmp_path: Path, key: str | None, zipped: bool) -> None:
        saved = OrderedDict(WEIGHTS) if key is None else {"epoch": 3, key: WEIGHTS, "optimizer": {"lr": 0.1}}
        torch.save(saved, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        assert_same(load_state_dict(str(tmp_path / "w.pt")))

    def test_parameters_come_as_plain_tensors(self, tmp_path: Path) -> None:
        torch.save({name: torch.nn.Parameter(tensor) for name, tensor in WEIGHTS.items()}, tmp_path / "w.pth")
        assert not any(tensor.requires_grad for tensor in load_state_dict(str(tmp_path / "w.pth")).values())

    def test_safetensors_file(self, tmp_path: Path) -> None:
        save_file(WEIGHTS, tmp_path / "w.safetensors")
        assert_same(load_state_dict(str(tmp_path / "w.safetensors")))

    def test_hugging_face_folders(self, tmp_path: Path) -> None:
        for name in ("a", "b", "c"):
            (tmp_path / name).mkdir()
        save_file(WEIGHTS, tmp_path / "a/model.safetensors")
        torch.save(WEIGHTS, tmp_path / "b/pytorch_model.bin")
        parts = {name: f"model-{i}.safetensors" for i, name in enumerate(WEIGHTS)}
        for name, part in parts.items():
            save_file({name: WEIGHTS[name]}, tmp_path / "c" / part)
        (tmp_path / "c/model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
        for name in ("a", "b", "c"):
            assert_same(load_state_dict(str(tmp_path / name)))
        (tmp_path / "c/model-1.safetensors").unlink()
        with pytest.raises(GradscaleError, match=r"every file that .*index\.json names, got no model-1\.safetensors"):
            load_state_dict(str(tmp_path / "c"))

    def test_deepspeed_tag_folder(self, tmp_path: Path) -> None:
        saved: dict[str, Any] = {"module": OrderedDict(WEIGHTS), "buffer_names": [], "ds_config": {}, "ds_version": "0"}
        torch.save(saved, tmp_path / "mp_rank_00_model_states.pt")
        assert_same(load_state_dict(str(tmp_path)))
        assert_same(load_state_dict(str(tmp_path / "mp_rank_00_model_states.pt")))

    @pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed writes the file")
    def test_objects_of_deepspeed_are_read_without_importing_it(self, tmp_path: Path) -> None:
        file, before = tmp_path / "mp_rank_00_model_states.pt", "deepspeed" in sys.modules
        subprocess.run([sys.executable, "-c", DEEPSPEED_WRITER, str(file)], check=True, capture_output=True)
        with pytest.raises(pickle.UnpicklingError, match="deepspeed"):
            torch.load(file, weights_only=True)
        assert_same(load_state_dict(str(tmp_path)))
        assert ("deepspeed" in sys.modules) == before


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Client:
    pass


class TestLoadRefuses:
    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_malicious_pickle_without_running_it(self, tmp_path: Path, zipped: bool) -> None:
        proof, file = tmp_path / "proof", tmp_path / "w.pt"
        torch.save({**WEIGHTS, "x": Malicious(proof)}, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(GradscaleError, match=r"must hold only tensors and plain values, got an object of posix"):
            load_state_dict(str(file))
        assert not proof.exists()
        torch.load(file, weights_only=False)
        assert proof.exists()  # the payload works: it was refused, not broken

    def test_a_call_through_a_class_of_deepspeed_runs_nothing(self, tmp_path: Path) -> None:
        payload = (
            b"\x80\x02cdeepspeed.utils.tensor_fragment\nfragment_address\nq\x00(X\x02\x00\x00\x00lsq\x01tq\x02Rq\x03."
        )
        (tmp_path / "w.bin").write_bytes(payload)
        with pytest.raises(GradscaleError, match=r"checkpoint .* must "):
            load_state_dict(str(tmp_path / "w.bin"))

    def test_objects_of_the_user(self, tmp_path: Path) -> None:
        torch.save({"module": WEIGHTS, "client_state": Client()}, tmp_path / "w.pt")
        with pytest.raises(GradscaleError, match=r"got an object of .*Client, which would run code to be read; save"):
            load_state_dict(str(tmp_path / "w.pt"))

    def test_a_file_of_one_rank(self, tmp_path: Path) -> None:
        file = tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
        torch.save({"module": {"w": torch.zeros(0)}, "ds_version": "0"}, file)
        with pytest.raises(GradscaleError, match=r"must hold whole weights, got one rank's part of them; name its fol"):
            load_state_dict(str(file))

    @pytest.mark.parametrize(
        ("name", "saved", "message"),
        [
            ("mp_rank_00_model_states.pt", {"module": None}, "weights under module, got NoneType; of a pipeline, save"),
            ("mp_rank_00_model_states.pt", [1], "weights under module, got NoneType"),
            ("mp_rank_00_model_states.pt", {"module": {"a": 1}}, "tensors under module, got a: int; leave out the"),
            (
                "zero_pp_rank_0_mp_rank_00_model_states.pt",
                {"module": {}},
                r"masters .* got no shapes in zero_pp_rank_0",
            ),
        ],
    )
    def test_model_states_of_another_kind(self, tmp_path: Path, name: str, saved: object, message: str) -> None:
        torch.save(saved, tmp_path / name)
        with pytest.raises(GradscaleError, match=message):
            load_state_dict(str(tmp_path))

    def test_dtype(self, tmp_path: Path) -> None:
        dtype: Any = "half"
        with pytest.raises(GradscaleError, match="dtype must be training or master, got half; training is the default"):
            load_state_dict(str(tmp_path), dtype)

    def test_a_malicious_part_of_a_hugging_face_folder(self, tmp_path: Path) -> None:
        proof, part = tmp_path / "proof", tmp_path / "part-1.bin"
        torch.save(WEIGHTS | {"x": Malicious(proof)}, part)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"0.weight": part.name}}))
        with pytest.raises(
            GradscaleError, match=r"part-1\.bin must hold only tensors .* got an object of posix\.mkdir"
        ):
            load_state_dict(str(tmp_path))
        assert not proof.exists()

    def test_tensor_parallel_slices(self, tmp_path: Path) -> None:
        touch(tmp_path, "mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt")
        with pytest.raises(GradscaleError, match="must hold whole weights, got 2 tensor-parallel slices"):
            load_state_dict(str(tmp_path))

    @pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
    @pytest.mark.parametrize("keep", [0, 40, -20])
    def test_truncated(self, tmp_path: Path, name: str, keep: int) -> None:
        file = tmp_path / name
        (torch.save if name == "w.pt" else save_file)(WEIGHTS, file)
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(
            GradscaleError, match=f"checkpoint .*{name} must be a whole file of weights, got .*truncated"
        ):
            load_state_dict(str(file))

    @pytest.mark.parametrize(
        ("saved", "actual"),
        [
            ([1, 2], "list"),
            ({}, "an empty mapping"),
            ({"epoch": 3, "w": torch.ones(1)}, "epoch: int"),
            ({"model": {"w": 1.0}}, "w: float"),
        ],
    )
    def test_no_state_dict(self, tmp_path: Path, saved: object, actual: str) -> None:
        torch.save(saved, tmp_path / "w.pt")
        with pytest.raises(GradscaleError, match=f"must hold a state dict, bare or under .*, got {actual}; save"):
            load_state_dict(str(tmp_path / "w.pt"))

    def test_other_folders_and_files(self, tmp_path: Path) -> None:
        with pytest.raises(GradscaleError, match="got an empty folder; name the folder of one checkpoint"):
            load_state_dict(str(tmp_path))
        touch(tmp_path, "w.npz")
        with pytest.raises(GradscaleError, match=r"must be a folder with .* got w\.npz; name"):
            load_state_dict(str(tmp_path))
        with pytest.raises(GradscaleError, match=r"checkpoint file must end in \.safetensors, .* got .*w\.npz; rename"):
            load_state_dict(str(tmp_path / "w.npz"))

    def test_uri(self) -> None:
        with pytest.raises(GradscaleError, match="must be a local path to be read, got s3://b/w; download it first"):
            load_state_dict("s3://b/w")
