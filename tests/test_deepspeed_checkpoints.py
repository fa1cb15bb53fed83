"""Promise: what DeepSpeed saved, at any ZeRO stage, of any number of ranks and universal, is read as its engine had it.

One launch writes all (tests/checkpoint_problems.py); the oracle is the weights of the live engines.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_problems import CASES, LARGE, LAYERS, Tied, made_large
from safetensors.torch import save_file
from torch import Tensor

from gradscale.checkpoints import Checkpoint, fingerprint, load_state_dict, load_weights, resolve
from gradscale.errors import GradscaleError
from gradscale.pickles import load_pickle

pytestmark = pytest.mark.filterwarnings("error")

ROOT = Path(__file__).parent.parent
TAGS = [(f"{name}-{world}", "global_step2") for name, case in CASES.items() for world in case.worlds]
TAGS += [(f"{n}-2", "global_step2_universal") for n, case in CASES.items() if case.stage and 2 in case.worlds]
MODELS, OPTIMIZERS = "zero_pp_rank_{}_mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the launch filled."""
    folder = tmp_path_factory.mktemp("saved")
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launched} | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".cache" / "torch_extensions"),
    }
    job = [sys.executable, str(ROOT / "tests" / "checkpoint_problems.py"), str(folder)]
    ended = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, f"the launch must end with 0, got {ended.returncode}:\n{ended.stderr[-5000:]}"
    return folder


@pytest.fixture
def tag(saved: Path, tmp_path: Path) -> Any:
    """Copies a tag to where a test may spoil it."""
    return lambda name, step="global_step2": Path(shutil.copytree(saved / name / step, tmp_path / name / step))


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


@pytest.mark.parametrize(("name", "step"), TAGS)
def test_weights_are_bit_for_bit_those_of_the_engine(saved: Path, name: str, step: str) -> None:
    expected = torch.load(saved / f"{name}.pt")
    low = {t.dtype for t in expected["training"].values()} >= {torch.bfloat16}
    assert low == ("bf16" in name)
    path, imported = str(saved / name / step), "deepspeed" in sys.modules
    assert same(load_state_dict(path), expected["training"])
    if name != "zero0-bf16-2":
        assert same(load_state_dict(path, "master"), expected["master"])
        assert same(expected["training"], expected["master"]) != low  # the two are told apart
    assert ("deepspeed" in sys.modules) == imported


def test_packed_vectors_have_gaps_and_another_order(saved: Path) -> None:
    optimizer: Any = load_pickle(saved / "packed-2/global_step2" / OPTIMIZERS.format(0))
    states: Any = load_pickle(saved / "packed-2/global_step2/mp_rank_00_model_states.pt")
    assert any(any(gaps) for gaps in optimizer["optimizer_state_dict"]["param_alignment_paddings"])
    plain: Any = load_pickle(saved / "zero2-fp32-2/global_step2/mp_rank_00_model_states.pt")
    assert [list(group) for group in states["param_shapes"]] != [list(group) for group in plain["param_shapes"]]


def test_weights_go_into_a_model_that_ties_them(saved: Path) -> None:
    path, model = str(saved / "zero3-bf16-3/global_step2"), Tied()
    load_weights(model, path, "master")
    found = load_state_dict(path, "master")
    assert model.head.weight is model.words.weight
    assert found["head.weight"] is found["words.weight"]
    assert all(torch.equal(tensor, found[name].to(tensor.dtype)) for name, tensor in model.state_dict().items())


class TestResolve:
    def test_a_root_stands_for_its_tag_and_not_for_what_was_made_of_it(self, saved: Path) -> None:
        root = saved / "zero3-bf16-2"
        assert resolve([str(root)]) == (Checkpoint(2, str(root / "global_step2")),)
        assert resolve([str(root / "global_step*")]) == (Checkpoint(2, str(root / "global_step2")),)
        universal = str(root / "global_step2_universal")
        assert resolve([universal]) == (Checkpoint(2, universal),)

    def test_a_universal_checkpoint_alone(self, tag: Any) -> None:
        universal = tag("zero1-bf16-2", "global_step2_universal")
        assert resolve([str(universal.parent)]) == (Checkpoint(2, str(universal)),)

    def test_a_tag_of_any_name(self, tag: Any) -> None:
        final = tag("zero3-fp32-2")
        named = final.rename(final.with_name("final"))
        assert resolve([str(named.parent)]) == (Checkpoint(0, str(named)),)
        assert resolve([str(named)]) == (Checkpoint(0, str(named)),)

    def test_the_weights_of_a_root_are_those_of_its_latest_tag(self, saved: Path, tag: Any) -> None:
        root = saved / "zero2-bf16-3"
        assert same(load_state_dict(str(root)), torch.load(saved / "zero2-bf16-3.pt")["training"])
        alone = tag("zero2-bf16-3").parent
        (alone / "latest").write_text("global_step9")
        with pytest.raises(GradscaleError, match=r"that its file latest names, got no global_step9 with weights; copy"):
            load_state_dict(str(alone))


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class TestRefuses:
    @pytest.mark.parametrize(
        ("name", "step", "file", "dtype"),
        [
            ("zero0-fp32-2", "global_step2", "mp_rank_00_model_states.pt", "training"),
            ("zero2-bf16-3", "global_step2", "bf16_" + OPTIMIZERS.format(2), "master"),
            ("zero2-fp32-2", "global_step2", OPTIMIZERS.format(0), "master"),
            ("zero3-fp32-2", "global_step2", MODELS.format(0), "training"),
            ("zero3-fp32-2", "global_step2", MODELS.format(1), "training"),
            ("zero3-fp32-2", "global_step2", OPTIMIZERS.format(1), "training"),
            ("zero1-bf16-2", "global_step2_universal", "mp_rank_00_model_states.pt", "training"),
            ("zero1-bf16-2", "global_step2_universal", "zero/words.weight/fp32.pt", "master"),
            ("zero3-bf16-2", "global_step2_universal", "zero/gain/fp32.pt", "training"),
        ],
    )
    def test_a_malicious_file_of_every_kind(self, tag: Any, name: str, step: str, file: str, dtype: Any) -> None:
        folder = tag(name, step)
        proof = folder / "proof"
        assert (folder / file).is_file()
        torch.save({"module": {}, "optimizer_state_dict": {}, "x": Malicious(proof)}, folder / file)
        with pytest.raises(GradscaleError, match=rf"{file} must hold only tensors .* an object of posix\.mkdir, which"):
            load_state_dict(str(folder), dtype)
        assert not proof.exists()
        torch.load(folder / file, weights_only=False)
        assert proof.exists()  # the payload works: it was refused, not broken

    @pytest.mark.parametrize(
        ("name", "step", "file"),
        [
            ("zero2-bf16-3", "global_step2", "bf16_" + OPTIMIZERS.format(0)),
            ("zero2-fp32-2", "global_step2", OPTIMIZERS.format(1)),
            ("zero3-fp32-3", "global_step2", OPTIMIZERS.format(1)),
            ("zero3-fp32-3", "global_step2", MODELS.format(0)),
            ("zero3-fp32-3", "global_step2", MODELS.format(2)),
            ("zero3-bf16-2", "global_step2_universal", "zero/mix.bias/fp32.pt"),
        ],
    )
    def test_a_file_that_is_missing_or_cut(self, tag: Any, name: str, step: str, file: str) -> None:
        folder = tag(name, step)
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) // 2])
        with pytest.raises(GradscaleError, match=f"checkpoint .*{file} must be a whole file of weights, got .*truncat"):
            load_state_dict(str(folder), "master")
        (folder / file).unlink()
        message = f"must hold .*, got no {Path(file).name}; copy it from the machine that wrote it"
        with pytest.raises(GradscaleError, match=message):
            load_state_dict(str(folder), "master")

    def test_parts_of_another_number_of_ranks(self, saved: Path, tag: Any) -> None:
        folder = tag("zero3-fp32-2")
        shutil.copy(saved / "zero3-fp32-3/global_step2" / OPTIMIZERS.format(2), folder)
        with pytest.raises(GradscaleError, match=r"of 2 ranks, got 3 files up to zero_pp_rank_2_.*; remove those"):
            load_state_dict(str(folder))

    @pytest.mark.parametrize(
        ("name", "other", "file", "message"),
        [
            (
                "zero3-fp32-3",
                "zero3-fp32-2",
                OPTIMIZERS.format(1),
                r"got partition_count 3 in .*, 2 in zero_pp_rank_1_",
            ),
            (
                "zero2-fp32-2",
                "packed-2",
                OPTIMIZERS.format(1),
                r"got param_alignment_paddings \[.* in .*rank_1_.*; copy",
            ),
            (
                "zero3-fp32-2",
                "zero3-fp32-3",
                MODELS.format(1),
                r"must hold 30 entries of places\.weight, got 25; its fi",
            ),
        ],
    )
    def test_parts_of_another_run(self, saved: Path, tag: Any, name: str, other: str, file: str, message: str) -> None:
        folder = tag(name)
        shutil.copy(saved / other / "global_step2" / file, folder)
        with pytest.raises(GradscaleError, match=message):
            load_state_dict(str(folder), "master")

    def test_masters_where_there_are_none(self, saved: Path) -> None:
        with pytest.raises(GradscaleError, match=r"float32 masters .* got no .*optim_states\.pt; .* dtype training"):
            load_state_dict(str(saved / "zero0-bf16-2/global_step2"), "master")

    def test_tensor_parallel_slices_of_stage_3(self, tag: Any) -> None:
        folder = tag("zero3-fp32-2")
        shutil.copy(folder / MODELS.format(0), folder / MODELS.format(0).replace("mp_rank_00", "mp_rank_01"))
        with pytest.raises(GradscaleError, match=r"whole weights, got 2 tensor-parallel slices or experts .*; join"):
            load_state_dict(str(folder))

    def test_two_stages_in_one_folder(self, saved: Path, tag: Any) -> None:
        folder = tag("zero3-fp32-2")
        shutil.copy(saved / "zero1-fp32-2/global_step2/mp_rank_00_model_states.pt", folder)
        with pytest.raises(GradscaleError, match=r"of one ZeRO stage, got mp_rank_00_\w+\.pt and zero_pp.*; remove"):
            load_state_dict(str(folder))

    def test_an_optimizer_of_another_kind(self, tag: Any) -> None:
        folder = tag("zero1-fp32-2")
        file = folder / OPTIMIZERS.format(1)
        states: Any = load_pickle(file)
        layout = {key: states["optimizer_state_dict"][key] for key in ("partition_count", "param_alignment_paddings")}
        for other, message in (
            ([1], "no optimizer_state_dict in"),
            ({"optimizer_state_dict": layout}, "no single_par"),
        ):
            torch.save(other, file)
            with pytest.raises(GradscaleError, match=f"masters of its weights by name, got {message}"):
                load_state_dict(str(folder), "master")

    def test_a_universal_parameter_of_another_shape(self, tag: Any) -> None:
        folder = tag("zero3-bf16-2", "global_step2_universal")
        torch.save(torch.ones(2), folder / "zero/gain/fp32.pt")
        with pytest.raises(GradscaleError, match=r"gain/fp32\.pt must hold the 1 masters of a parameter, got 2; conv"):
            load_state_dict(str(folder))

    def test_experts(self, tag: Any) -> None:
        folder = tag("zero2-bf16-1")
        (folder / "layer_0_expert_0_mp_rank_00_model_states.pt").touch()
        with pytest.raises(
            GradscaleError, match=r"whole weights, got 1 tensor-parallel slices or experts \(layer_0_ex"
        ):
            load_state_dict(str(folder))


class TestFingerprint:
    def test_depends_on_any_entry_of_a_rank(self, saved: Path, tmp_path: Path) -> None:
        file = "bf16_" + OPTIMIZERS.format(1)
        shutil.copytree(saved / "large/global_step0", tmp_path / "a")
        states: Any = load_pickle(tmp_path / "a" / file)
        vectors = states["optimizer_state_dict"]["fp32_flat_groups"]
        middle = vectors[LAYERS // 2].detach()
        assert vectors[LAYERS - 1].nbytes > 1 << 20  # neither MiB at the ends of the file has an entry of the middle
        prints, sizes = [], []
        for change in (0, 0, 1):
            middle[12345] += change
            torch.save(
                {"optimizer_state_dict": {"fp32_flat_groups": [each.detach() for each in vectors]}}, tmp_path / "w"
            )
            shutil.move(tmp_path / "w", tmp_path / "a" / file)
            prints.append(fingerprint(str(tmp_path / "a")))
            sizes.append((tmp_path / "a" / file).stat().st_size)
        assert prints[0] == prints[1] != prints[2]  # the checksums of all tensors stand at a file's end
        assert len(set(sizes)) == 1

    def test_depends_on_which_ranks_are_there(self, tag: Any) -> None:
        folder = tag("zero3-bf16-2", "global_step2_universal")
        before = fingerprint(str(folder))
        (folder / MODELS.format(1)).unlink()
        assert fingerprint(str(folder)) != before


MEASURE = """
import sys, threading
from checkpoint_problems import made_large
from gradscale.checkpoints import load_state_dict, load_weights
from gradscale.weights import open_weights

def anonymous():  # MiB that the process holds beyond mapped files
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

def held(read):
    tensor = read()
    tensor.sum()
    return anonymous()

def peak(call):  # of many samples, while it runs
    samples, done = [], threading.Event()
    def sample():
        while not done.wait(0.0005):
            samples.append(anonymous())
    thread = threading.Thread(target=sample)
    thread.start()
    while len(samples) <= 20:  # again, where a call is over before it has been looked at
        call()
    done.set()
    thread.join()
    return max(samples)

path, dtype = sys.argv[1:]
model = made_large()
start = anonymous()
one = max(held(read) for read in open_weights(path, dtype).readers.values())
into = peak(lambda: load_weights(model, path, dtype))
found = peak(lambda: model.load_state_dict(load_state_dict(path, dtype)))
print(one - start, into - start, found - start)
"""


def measured(path: Path, dtype: str) -> list[float]:
    environment = dict(os.environ) | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    job = [sys.executable, "-c", MEASURE, str(path), dtype]
    ended = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return [float(each) for each in ended.stdout.split()]


class TestMemory:
    """Of 96 MiB of masters, 4 MiB a weight."""

    def test_of_stage_3_one_weight_is_held_at_a_time(self, saved: Path) -> None:
        path = saved / "large/global_step0"
        expected = made_large().bfloat16().state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load_state_dict(str(path)).items())
        size = LAYERS * LARGE * LARGE * 4 / 2**20
        one, into, all_of_them = measured(path, "master")
        assert max(one, into) < 0.1 * size
        assert all_of_them > 0.9 * size  # the same way of measuring sees them

    def test_of_safetensors_too(self, tmp_path: Path) -> None:
        save_file(made_large().state_dict(), tmp_path / "w.safetensors")
        one, into, _ = measured(tmp_path / "w.safetensors", "training")
        assert max(one, into) < 10
