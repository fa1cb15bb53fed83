"""The transformers tasks: every example has the loss and gradient it has alone, and checkpoints are loaded exactly."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from gradscale.errors import GradscaleError
from gradscale.task import Task, load_task
from gradscale.tasks.causal_lm import CausalLM, next_token_losses
from gradscale.tasks.classification import Classification

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("error")

TEXTS = ["a short one", "né, the longest of them all by far", "ab", "middling length"]
IDS = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [3, 1]]


def gpt2_config(**changes: Any) -> Any:
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64, "vocab_size": 260}
    return transformers.GPT2Config(**(sizes | {"bos_token_id": 257, "eos_token_id": 257} | changes))


def bert_config(**changes: Any) -> Any:
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.BertConfig(**(sizes | {"vocab_size": 260, "max_position_embeddings": 40} | changes))


def vit_config() -> Any:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=3, num_labels=3)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes columns to a Parquet file, or a config to a config.json, and returns its path."""

    def written(name: str, content: Any) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.table(content), path)
        else:
            path.write_text(json.dumps(content.to_dict() if hasattr(content, "to_dict") else content))
        return str(path)

    return written


def save_hugging_face(model: Any, folder: Path) -> str:
    """What `save_pretrained` writes, without its progress bar."""
    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.to_json_file(str(folder / "config.json"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), **options)])


def assert_alone_equals_in_a_batch(task: Task, count: int) -> None:
    model = task.model(None)
    assert not model.training
    together = task.losses(model, task.examples().batch(range(count)))
    assert together.shape == (count,)
    for i in range(count):
        alone = task.losses(model, task.examples().batch(range(i, i + 1)))
        torch.testing.assert_close(together[i], alone[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient(together[i], model), gradient(alone[0], model), rtol=1e-8, atol=1e-10)


class TestCausalLM:
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_an_example_has_the_gradient_that_it_has_alone(self, write: Callable[..., str], attention: str) -> None:
        model, data = write("config.json", gpt2_config()), write("x.parquet", {"text": TEXTS})
        task = CausalLM(data, model, dtype="float64", attn_implementation=attention)
        assert_alone_equals_in_a_batch(task, len(TEXTS))

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_losses_are_those_of_transformers(self, write: Callable[..., str], reduction: Any) -> None:
        labels = [[-100, -100, 3, 4, 5], [6, 7, -100], [-100] * 6 + [9], [3, 1]]
        data = write("x.parquet", {"input_ids": IDS, "labels": labels})
        task = CausalLM(data, write("config.json", gpt2_config()), reduction=reduction)
        model = task.model(None)
        losses = task.losses(model, task.examples().batch(range(4)))
        for i in range(4):
            theirs = model(input_ids=torch.tensor([IDS[i]]), labels=torch.tensor([labels[i]])).loss
            count = sum(label != -100 for label in labels[i][1:]) if reduction == "sum" else 1
            torch.testing.assert_close(losses[i], theirs * count, rtol=1e-5, atol=1e-5)

    def test_losses_of_half_precision_logits_are_float32(self) -> None:
        logits, labels = torch.randn(2, 5, 7).bfloat16(), torch.randint(7, (2, 5))
        losses = next_token_losses(logits, labels, "mean")
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses[1], F.cross_entropy(logits[1, :-1].float(), labels[1, 1:]))

    def test_bytes_cut_to_the_models_positions(self, write: Callable[..., str]) -> None:
        data = write("x.parquet", {"text": ["é" * 100, "ab"]})
        batch = CausalLM(data, write("config.json", gpt2_config())).examples().batch(range(2))
        assert batch["input_ids"].shape == (2, 64)
        assert batch["input_ids"][0, :2].tolist() == [0xC3, 0xA9]
        assert batch["attention_mask"].sum(1).tolist() == [64, 2]
        assert batch["labels"][1, 2:].eq(-100).all()
        short = CausalLM(data, write("config.json", gpt2_config()), max_length=3).examples().batch(range(2))
        assert short["input_ids"].shape == (2, 3)

    def test_rows_padded_beforehand_are_unpadded(self, write: Callable[..., str]) -> None:
        columns = {"input_ids": [[7, 8, 0, 0], [0, 1, 2, 3]], "attention_mask": [[1, 1, 0, 0], [0, 1, 1, 1]]}
        data = write("x.parquet", columns | {"labels": [[7, 8, 0, 0], [0, 1, 2, 3]]})
        batch = CausalLM(data).examples().batch(range(2))
        assert batch["input_ids"].tolist() == [[7, 8, 0], [1, 2, 3]]
        assert batch["labels"].tolist() == [[7, 8, -100], [1, 2, 3]]

    def test_json_lines(self, write: Callable[..., str], tmp_path: Path) -> None:
        (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        model = write("config.json", gpt2_config())
        lines, parquet = (
            CausalLM(str(tmp_path / "x.jsonl"), model),
            CausalLM(write("x.parquet", {"text": TEXTS}), model),
        )
        batches = [task.examples().batch(range(1, 4)) for task in (lines, parquet)]
        assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])

    def test_tokenizer_of_the_model_folder(self, write: Callable[..., str], tmp_path: Path) -> None:
        tokenizers = pytest.importorskip("tokenizers")
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "short": 2}, unk_token="[UNK]"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        write("model/config.json", gpt2_config())
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(
            tmp_path / "model"
        )
        data = write("x.parquet", {"text": TEXTS[:1]})
        task = CausalLM(data, str(tmp_path / "model"))
        assert task.examples().batch(range(1))["input_ids"].tolist() == [[1, 2, 0]]
        same = CausalLM(data, write("config.json", gpt2_config()), tokenizer=str(tmp_path / "model"))
        assert same.examples().batch(range(1))["input_ids"].tolist() == [[1, 2, 0]]
        raw = CausalLM(data, str(tmp_path / "model"), tokenizer="bytes")
        assert raw.examples().batch(range(1))["input_ids"].shape == (1, 11)

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"text": ["ab", "a"]}, "example 1 of .* must have at least two tokens, got 1; drop it"),
            ({"text": ["ab", None]}, "example 1 of .* must have a value in column text, got null"),
            ({"input_ids": [[1, 2], [3, 260]]}, "example 1 of .* must have token ids from 0 to 259, got 3 to 260; use"),
            (
                {"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3, -100]]},
                "example 1 of .* must have a label other than -100 after the first of its 2 tokens, got none; drop it",
            ),
            (
                {"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3]]},
                "example 1 of .* must have one label a token, got 1 for 2",
            ),
            (
                {"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3, 999]]},
                "example 1 of .* must have labels from 0 to 259, or -100, got 999 to 999",
            ),
            (
                {"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1]]},
                "example 1 of .* must have one attention_mask a token, got 1 for 2",
            ),
            ({"input_ids": ["a", "b"]}, "column input_ids must hold lists of integers, got string; name another"),
            ({"text": [1, 2]}, "column text must hold text, got int64; name another with text_column"),
            ({"words": ["a"]}, r"must have a column input_ids \(token ids\) or text \(text\), got words; name it"),
        ],
    )
    def test_refused_data(self, write: Callable[..., str], columns: dict[str, Any], message: str) -> None:
        task = CausalLM(write("x.parquet", columns), write("config.json", gpt2_config()))
        with pytest.raises(GradscaleError, match=message):
            task.examples().batch(range(2))

    def test_refused_settings(self, write: Callable[..., str], tmp_path: Path) -> None:
        data, model = write("x.parquet", {"text": TEXTS}), write("config.json", gpt2_config())
        with pytest.raises(GradscaleError, match="reduction must be mean or sum, got max"):
            CausalLM(data, model, reduction="max")  # type: ignore[arg-type]
        with pytest.raises(GradscaleError, match=r"dtype must be one of float32, .* got int8"):
            CausalLM(data, model, dtype="int8").model(None)
        with pytest.raises(GradscaleError, match="max_length must be at least 1, got 0"):
            CausalLM(data, model, max_length=0).examples()
        with pytest.raises(GradscaleError, match=r"tokenizer must be bytes or a folder with .* got gpt2; save it"):
            CausalLM(data, model, tokenizer="gpt2").examples()
        with pytest.raises(GradscaleError, match=r"model must be a transformers model folder or .* got none; pass"):
            CausalLM(data).model(None)
        with pytest.raises(
            GradscaleError, match=r"model must be a folder with a config.json, .* got gpt2; .*hf download"
        ):
            CausalLM(data, "gpt2").model(None)
        with pytest.raises(GradscaleError, match=r"model config .* must be of an architecture .* got .*no-such-model"):
            CausalLM(data, write("other.json", {"model_type": "no-such-model"})).model(None)
        with pytest.raises(GradscaleError, match=r"must be one that AutoModelForCausalLM can load .* got .*ViTConfig"):
            CausalLM(data, write("vit.json", vit_config())).model(None)


class TestCheckpoints:
    @pytest.fixture
    def config(self, write: Callable[..., str]) -> str:
        return write("config.json", gpt2_config())

    @pytest.fixture
    def trained(self, config: str) -> Any:
        return CausalLM("unused", config, seed=7).model(None)

    @staticmethod
    def assert_same(model: nn.Module, expected: nn.Module) -> None:
        torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
        assert not model.training

    def test_random_weights_come_from_the_seed_alone(self, config: str, trained: nn.Module) -> None:
        torch.manual_seed(123)
        before = torch.get_rng_state()
        again = CausalLM("unused", config, seed=7).model(None)
        assert torch.equal(torch.get_rng_state(), before)
        self.assert_same(again, trained)
        other = CausalLM("unused", config, seed=8).model(None)
        assert not torch.equal(next(other.parameters()), next(trained.parameters()))

    def test_hugging_face_folder(self, config: str, trained: Any, tmp_path: Path) -> None:
        folder = save_hugging_face(trained, tmp_path / "checkpoint-5")
        self.assert_same(CausalLM("unused", config).model(folder), trained)
        self.assert_same(CausalLM("unused").model(folder), trained)
        self.assert_same(CausalLM("unused", folder).model(None), trained)

    @pytest.mark.parametrize("tied", [True, False])
    def test_deepspeed_tag_folder(self, config: str, trained: Any, tmp_path: Path, tied: bool) -> None:
        state = trained.state_dict()
        if tied:
            del state["lm_head.weight"]
        folder = tmp_path / "global_step5"
        folder.mkdir()
        torch.save({"module": state, "ds_version": "0"}, folder / "mp_rank_00_model_states.pt")
        model = CausalLM("unused", config).model(str(folder))
        self.assert_same(model, trained)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    def test_weights_are_cast_to_the_dtype(self, config: str, trained: Any, tmp_path: Path) -> None:
        torch.save(trained.bfloat16().state_dict(), tmp_path / "w.pt")
        model = CausalLM("unused", config, dtype="float64").model(str(tmp_path / "w.pt"))
        self.assert_same(model, trained.double())

    def test_other_weights(self, config: str, trained: Any, tmp_path: Path) -> None:
        file = str(tmp_path / "w.pt")
        state = trained.state_dict()
        changes: list[tuple[dict[str, Tensor | None], str]] = [
            ({"transformer.wpe.weight": None}, "got 1 missing: transformer.wpe.weight; check that --model"),
            ({"x": torch.ones(1), "y": torch.ones(1)}, "got 2 unexpected: x, y; check"),
            (
                {"transformer.ln_f.bias": torch.ones(3)},
                r"1 other shapes of: transformer.ln_f.bias \(3,\) instead of \(16",
            ),
            ({"lm_head.weight": torch.ones(260, 16)}, "got 1 different values of the tied: "),
            (
                {"lm_head.weight": None, "transformer.wte.weight": None},
                "2 missing: lm_head.weight, transformer.wte.weight",
            ),
        ]
        for change, message in changes:
            changed = state | change
            torch.save({name: tensor for name, tensor in changed.items() if tensor is not None}, file)
            with pytest.raises(GradscaleError, match=message):
                CausalLM("unused", config).model(file)

    def test_incomplete_hugging_face_folder(self, config: str, trained: Any, tmp_path: Path) -> None:
        folder = save_hugging_face(trained, tmp_path / "checkpoint-5")
        state = load_file(f"{folder}/model.safetensors")
        del state["transformer.h.0.ln_1.weight"]
        save_file(state, f"{folder}/model.safetensors", metadata={"format": "pt"})
        for task, checkpoint in ((CausalLM("unused", config), folder), (CausalLM("unused", folder), None)):
            with pytest.raises(GradscaleError, match=r"got 1 missing: transformer\.h\.0\.ln_1\.weight; check"):
                task.model(checkpoint)

    def test_damaged_and_malicious_hugging_face_folders(self, config: str, trained: Any, tmp_path: Path) -> None:
        folder = Path(save_hugging_face(trained, tmp_path / "checkpoint-5"))
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-9])
        with pytest.raises(
            GradscaleError, match=r"must be one that AutoModelForCausalLM can load .*, got .*incomplete"
        ):
            CausalLM("unused", config).model(str(folder))
        weights.unlink()
        torch.save(trained.state_dict() | {"x": MakesFolder(tmp_path / "proof")}, folder / "pytorch_model.bin")
        with pytest.raises(GradscaleError, match=r"must be one that AutoModelForCausalLM can load"):
            CausalLM("unused", config).model(str(folder))
        assert not (tmp_path / "proof").exists()


class MakesFolder:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class TestClassification:
    @pytest.mark.parametrize("pad", [None, 5])
    @pytest.mark.parametrize("config", [gpt2_config, bert_config])
    def test_a_text_has_the_gradient_that_it_has_alone(
        self, write: Callable[..., str], config: Callable[..., Any], pad: int | None
    ) -> None:
        model = write("config.json", config(num_labels=3, pad_token_id=pad or (None if config is gpt2_config else 0)))
        data = write("x.parquet", {"text": TEXTS, "label": [0, 1, 2, 1]})
        task = Classification(data, model, dtype="float64")
        assert_alone_equals_in_a_batch(task, len(TEXTS))
        assert task.labels(task.examples().batch(range(1, 3))).tolist() == [1, 2]

    def test_losses_are_those_of_transformers(self, write: Callable[..., str]) -> None:
        data = write("x.parquet", {"input_ids": IDS, "label": [0, 1, 2, 1]})
        task = Classification(data, write("config.json", bert_config(num_labels=3)))
        model = task.model(None)
        losses = task.losses(model, task.examples().batch(range(4)))
        theirs = [
            model(input_ids=torch.tensor([IDS[i]]), labels=torch.tensor([[0, 1, 2, 1][i]])).loss for i in range(4)
        ]
        torch.testing.assert_close(losses, torch.stack(theirs))

    @pytest.mark.parametrize("flat", [True, False])
    def test_images(self, write: Callable[..., str], flat: bool) -> None:
        pixels = torch.randn(4, 3, 8, 8)
        rows = pixels.flatten(1).tolist() if flat else pixels.tolist()
        data = write("x.parquet", {"pixel_values": rows, "label": [0, 1, 2, 1]})
        task = Classification(data, write("config.json", vit_config()), dtype="float64")
        batch = task.examples().batch(range(4))
        assert torch.equal(batch["pixel_values"], pixels)
        assert task.outputs(task.model(None), batch).shape == (4, 3)
        assert_alone_equals_in_a_batch(task, 4)

    def test_number_of_labels(self, write: Callable[..., str]) -> None:
        data = write("x.parquet", {"text": TEXTS, "label": [0, 1, 4, 1]})
        config = write("config.json", bert_config(num_labels=3))
        with pytest.raises(
            GradscaleError, match=r"example 2 of .* must have a class from 0 to 2, got 4; set num_labels"
        ):
            Classification(data, config).examples().batch(range(4))
        task = Classification(data, config, num_labels=5)
        assert task.outputs(task.model(None), task.examples().batch(range(4))).shape == (4, 5)
        with pytest.raises(GradscaleError, match="num_labels must be at least 2, got 1"):
            Classification(data, config, num_labels=1)

    def test_a_folder_without_a_head_gets_one_from_the_seed(self, write: Callable[..., str], tmp_path: Path) -> None:
        lm = CausalLM("unused", write("config.json", gpt2_config()), seed=7).model(None)
        folder = save_hugging_face(lm, tmp_path / "gpt2")
        data = write("x.parquet", {"text": TEXTS, "label": [0, 1, 2, 1]})
        heads = [Classification(data, folder, num_labels=3, seed=seed).model(None).score.weight for seed in (1, 1, 2)]
        assert torch.equal(heads[0], heads[1])
        assert not torch.equal(heads[0], heads[2])
        with pytest.raises(GradscaleError, match=r"checkpoint .* got 1 missing: score\.weight"):
            Classification(data, folder, num_labels=3).model(folder)

    def test_checkpoints(self, write: Callable[..., str], tmp_path: Path) -> None:
        data = write("x.parquet", {"text": TEXTS, "label": [0, 1, 2, 1]})
        task = Classification(data, write("config.json", bert_config(num_labels=3)))
        trained = Classification(data, str(tmp_path / "config.json"), seed=7).model(None)
        folder = save_hugging_face(trained, tmp_path / "checkpoint-3")
        torch.save(trained.state_dict(), tmp_path / "w.pt")
        for model in (task.model(folder), task.model(str(tmp_path / "w.pt")), Classification(data).model(folder)):
            torch.testing.assert_close(model.state_dict(), trained.state_dict(), rtol=0, atol=0)
        with pytest.raises(GradscaleError, match=r"can load with these options, got .*; check model_type, num_labels"):
            Classification(data, num_labels=4).model(folder)

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"text": ["a", "b"], "label": ["x", "y"]}, "column label must hold integer classes, got string; number"),
            ({"text": ["a", "b"], "label": [0, -1]}, "example 1 of .* must have a class from 0 to 1, got -1"),
            ({"text": ["a", "b"], "label": [0, None]}, "example 1 of .* must have a value in column label, got null"),
            ({"text": ["a", ""], "label": [0, 1]}, "example 1 of .* must have at least one token, got none; drop it"),
            ({"text": ["a"]}, r"column must be one of those in .* \(text\), got label; name"),
            ({"label": [1]}, "must have a column input_ids .* or text .* got label; name it"),
        ],
    )
    def test_refused_texts(self, write: Callable[..., str], columns: dict[str, Any], message: str) -> None:
        task = Classification(write("x.parquet", columns), write("config.json", bert_config()))
        with pytest.raises(GradscaleError, match=message):
            task.examples().batch(range(2))

    def test_refused_images(self, write: Callable[..., str]) -> None:
        config = write("config.json", vit_config())
        raw = write("x.parquet", {"pixel_values": pa.array([[0] * 192], pa.list_(pa.uint8())), "label": [0]})
        with pytest.raises(GradscaleError, match="column pixel_values must hold floats, got uint8; apply"):
            Classification(raw, config).examples().batch(range(1))
        short = write("x.parquet", {"pixel_values": [[0.5] * 7], "label": [0]})
        message = (
            r"must hold images \[channels, height, width\] or 192 numbers for \(3, 8, 8\), got rows of shape \(7,\)"
        )
        with pytest.raises(GradscaleError, match=message):
            Classification(short, config).examples().batch(range(1))
        text = write("x.parquet", {"text": TEXTS, "label": [0, 1, 2, 1]})
        with pytest.raises(GradscaleError, match="got pixel_values; name one of them"):
            Classification(text, config).examples()

    def test_a_model_that_is_no_classifier(self, write: Callable[..., str]) -> None:
        config = write("config.json", {"model_type": "whisper"})
        with pytest.raises(GradscaleError, match="must be a sequence or image classifier, got model_type whisper with"):
            Classification("unused", config).model(None)


@pytest.mark.parametrize(("name", "kind"), [("causal-lm", CausalLM), ("classification", Classification)])
def test_ready_tasks_pickle_and_are_found_by_name(write: Callable[..., str], name: str, kind: type) -> None:
    data = write("x.parquet", {"text": TEXTS, "label": [0, 1, 1, 0]})
    task = load_task(name, data=data, model_dir=write("config.json", gpt2_config()), max_length=None)
    assert isinstance(task, kind)
    assert pickle.loads(pickle.dumps(task)) == task
    examples = task.examples()
    expected = examples.batch(range(4))
    found = pickle.loads(pickle.dumps(examples)).batch(range(4))
    assert all(torch.equal(found[column], expected[column]) for column in expected)


def test_transformers_is_imported_late_and_missed_clearly() -> None:
    code = """
import sys
import gradscale.tasks.causal_lm as lm, gradscale.tasks.classification
assert not {"transformers", "pyarrow", "deepspeed"} & set(sys.modules)
sys.modules["transformers"] = None
lm.CausalLM("x", sys.argv[1]).model(None)
"""
    run = subprocess.run([sys.executable, "-c", code, __file__], capture_output=True, text=True, check=False)
    assert "GradscaleError: transformers must be installed for this task, got" in run.stderr
    assert "pip install transformers" in run.stderr
