"""``shardwise generate``: the tokens of the model in memory, whatever the map, the ranks, and who was killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import processes
from processes import Process
from ranks import run
from shardwise import cli, quantize
from shardwise.cli.generate import told
from shardwise.cli.generate.answers import Answers, Writer
from shardwise.cli.generate.job import Job
from shardwise.cli.generate.prompts import Prompt
from shardwise.errors import CheckpointError, ConfigError
from slowly import in_turn
from test_launch import command, refused, start

NEW = 10
TEXT = "the quick brown fox jumps over a lazy dog"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A Llama whose weights are not tied, in fp32, and a GPT-2 whose are; random, with a tokenizer of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, "and another line", "of text"] * 5, trainer)
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=0, bos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    gpt2 = GPT2Config(
        vocab_size=300, n_embd=32, n_layer=3, n_head=2, n_positions=128, eos_token_id=0, bos_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    base, out = tmp_path_factory.mktemp("models"), {}
    for name, model in (("llama", LlamaForCausalLM(llama)), ("gpt2", GPT2LMHeadModel(gpt2))):
        out[name] = str(base / name)
        model.save_pretrained(out[name])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(out[name])
    return out


def alone(folder: str, ids: list[int], **arguments: Any) -> list[int]:
    """The new tokens, of transformers with the model in memory."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    rows = model.eval().generate(torch.tensor([ids]), max_new_tokens=NEW, pad_token_id=0, **arguments)
    return rows[0, len(ids) :].tolist()


def text_alone(folder: str, text: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.decode(alone(folder, tokenizer(text)["input_ids"]), skip_special_tokens=True)


def here(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """The command, in this process. Returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["shardwise", "generate", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def answered(out: Path) -> dict[Any, Any]:
    """What each id was answered; every line is whole, and no id is there twice."""
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({json.dumps(a["id"]) for a in found}) == len(found) and out.read_bytes().endswith(b"\n")
    return {a["id"]: a.get("text", a.get("ids")) for a in found}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


# --- one text -------------------------------------------------------------------------------------
@in_turn(model=["llama", "gpt2"], where=["auto", "disk", "cpu", "split", '{"": "disk", "lm_head": "cpu"}'])
def test_the_text_is_that_of_the_model_in_memory(model, where, folders, monkeypatch, capfd):
    code = here(monkeypatch, folders[model], "the quick", "--max-new-tokens", NEW, "--device-map", where)
    out, err = capfd.readouterr()
    assert code == 0, err
    assert out == text_alone(folders[model], "the quick") + "\n"
    for words in (" tokens/s, the first after ", "memory: host ", "streamed buffers ", "\nbound by "):
        assert words in err
    assert ("per token, read at " in err) == ("disk" in where)


def test_tokens_as_numbers_need_no_tokenizer(folders, tmp_path, monkeypatch, capfd):
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(Path(folders["llama"], name).read_bytes())
    code = here(monkeypatch, tmp_path, "--ids", "5 6, 7", "--max-new-tokens", NEW, "--greedy", "--device-map", "disk")
    out, err = capfd.readouterr()
    assert code == 0, err
    assert [int(word) for word in out.split()] == alone(folders["llama"], [5, 6, 7], do_sample=False)
    assert "tokenizer" in refused(monkeypatch, capfd, "generate", str(tmp_path), "a text")


def test_a_seed_gives_the_same_draws_as_in_memory(folders, monkeypatch, capfd):
    shown = []
    for seed in (3, 3, 4):
        args = ["--ids", "5 6", "--max-new-tokens", NEW, "--temperature", 1.5, "--top-p", 0.9, "--seed", seed]
        assert here(monkeypatch, folders["llama"], *args) == 0
        shown.append([int(word) for word in capfd.readouterr().out.split()])
    torch.manual_seed(3)
    want = alone(folders["llama"], [5, 6], do_sample=True, temperature=1.5, top_p=0.9)
    assert shown[0] == shown[1] == want != shown[2]


def test_dtype_is_what_it_runs_in(folders, monkeypatch, capfd):
    args = ["--ids", "5 6 7", "--max-new-tokens", NEW, "--dtype", "bf16", "--device-map", "disk"]
    assert here(monkeypatch, folders["llama"], *args) == 0
    model: Any = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.bfloat16)
    want = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=NEW, pad_token_id=0)[0, 3:].tolist()
    assert [int(word) for word in capfd.readouterr().out.split()] == want


# --- several ranks --------------------------------------------------------------------------------
def test_weights_are_held_in_int8(folders, monkeypatch, capfd):
    args = ["--ids", "5 6 7", "--max-new-tokens", NEW, "--quantization", "int8"]
    assert here(monkeypatch, folders["llama"], *args) == 0
    model: Any = quantize(AutoModelForCausalLM.from_pretrained(folders["llama"]).eval())
    want = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=NEW, pad_token_id=0)[0, 3:].tolist()
    assert [int(word) for word in capfd.readouterr().out.split()] == want
    assert here(monkeypatch, folders["llama"], *args, "--device-map", "disk") != 0
    assert "shardwise.quantize_checkpoint" in capfd.readouterr().err


def _work(job: Job) -> bool:
    from shardwise.cli.generate.worker import work

    return work(job)


LENGTHS = [3, 9, 1, 5, 2]


def _job(folder: str, where: Any, scratch: Path, **changes: Any) -> Job:
    scratch.mkdir()
    prompts = [Prompt(n, None, [n + 1] * length, "", n) for n, length in enumerate(LENGTHS)]
    settings = {"max_memory": None, "dtype": None, "sampling": {"do_sample": False}, "max_new_tokens": NEW}
    settings |= {"seed": 0, "batch": 1, "length": None, "prompts": prompts, "out": str(scratch / "part")}
    return Job(folder=folder, device_map=where, scratch=str(scratch), **{**settings, **changes})


@in_turn(model=["llama", "gpt2"], where=["auto", "split", {"": "disk"}])
def test_ranks_share_prompts_of_different_lengths_out(model, where, folders, tmp_path):
    job = _job(folders[model], where, tmp_path / "s")
    assert run(2, _work, job) == [True, True]
    found = [answered(tmp_path / "s" / f"part-{rank}") for rank in range(2)]
    assert [list(part) for part in found] == [[0, 2, 4], [1, 3]]
    for p in job.prompts:
        assert {**found[0], **found[1]}[p.id] == alone(folders[model], p.ids, do_sample=False)
    facts = told.heard(tmp_path / "s")
    assert sum(f["tokens"] for f in facts) == sum(len(ids) for part in found for ids in part.values())


def test_split_weights_that_do_not_fit_are_read_from_the_disk_by_both(folders, tmp_path):
    memory = {"cpu": 2_250_000}
    job = _job(folders["llama"], "split", tmp_path / "s", max_memory=memory, batch=2)
    assert run(2, _work, job) == [True, True]
    found = {**answered(tmp_path / "s" / "part-0"), **answered(tmp_path / "s" / "part-1")}
    assert found == {p.id: alone(folders["llama"], p.ids, do_sample=False) for p in job.prompts}
    assert all(f["read"] > 0 for f in told.heard(tmp_path / "s"))


def test_a_rank_without_prompts_lends_its_part(folders, tmp_path):
    job = _job(folders["llama"], "split", tmp_path / "s")
    job.prompts[1:] = []
    assert run(2, _work, job) == [True, True]
    assert answered(tmp_path / "s" / "part-0") == {0: alone(folders["llama"], job.prompts[0].ids, do_sample=False)}
    assert not (tmp_path / "s" / "part-1").exists()


# --- files of prompts -----------------------------------------------------------------------------
def test_a_file_is_answered_and_later_lines_are_added(folders, tmp_path, monkeypatch, capfd):
    rows = [{"prompt": "the quick"}, {"id": "b", "prompt": "a lazy dog", "other": 1}, "", {"id": 9, "ids": [5, 6, 7]}]
    prompts, out = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    args = [folders["llama"], "--prompts", prompts, "--out", out, "--max-new-tokens", NEW, "--batch", 2]
    assert here(monkeypatch, *args) == 0, capfd.readouterr().err
    want = {1: text_alone(folders["llama"], "the quick"), "b": text_alone(folders["llama"], "a lazy dog")}
    want[9] = alone(folders["llama"], [5, 6, 7])
    assert answered(out) == want
    write(prompts, *rows, {"id": "c", "ids": [8]})
    assert here(monkeypatch, *args) == 0
    assert answered(out) == {**want, "c": alone(folders["llama"], [8])}
    assert "has 3 of 4 answers already" in capfd.readouterr().err
    before = out.stat().st_mtime_ns
    assert here(monkeypatch, *args) == 0 and out.stat().st_mtime_ns == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


COUNT = 40


def _many(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "in.jsonl", *({"id": n, "ids": [n + 1, 2]} for n in range(COUNT))), tmp_path / "out.jsonl"


def _written(out: Path) -> int:
    return sum(p.read_bytes().count(b"\n") for p in out.parent.glob(f"{out.name}*") if p.suffix != ".settings")


def _kill(process: Process, out: Path, lines: int) -> None:
    """End the command alone, at once, when there are so many answers."""
    process.until(lambda: _written(out) >= lines)
    os.kill(process.pid, signal.SIGKILL)
    assert process.finish()[0] == -signal.SIGKILL


def _all_there(folder: str, out: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    found = answered(out)
    assert sorted(found) == list(range(COUNT))
    for n, ids in found.items():
        rows = model.generate(torch.tensor([[n + 1, 2]]), max_new_tokens=NEW, pad_token_id=0, do_sample=False)
        assert ids == rows[0, 2:].tolist()
    assert sorted(p.name for p in out.parent.iterdir()) == ["in.jsonl", "out.jsonl"]


def _torn(out: Path) -> None:
    """What a kill in the middle of a write leaves. In a file of its own: ranks may be at work on theirs."""
    Path(f"{out}.part-0123456789ab-0").write_bytes(b'{"id": 39, "ids": [1, 2')


def _request(folder: str, prompts: Path, out: Path, ranks: int, where: str) -> list[object]:
    files = ["--prompts", prompts, "--out", out, "-n", ranks, "--device-map", where]
    return [folder, *files, "--max-new-tokens", NEW, "--greedy"]


def test_a_killed_run_goes_on(folders, tmp_path, monkeypatch, capfd):
    prompts, out = _many(tmp_path)
    request = _request(folders["llama"], prompts, out, 1, "disk")
    _kill(start("generate", *request, cwd=tmp_path), out, 3)
    _torn(out)
    assert here(monkeypatch, *request) == 0
    assert f" of {COUNT} answers already" in capfd.readouterr().err
    _all_there(folders["llama"], out)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["split", "auto"])
def test_a_run_that_lost_a_rank_goes_on_with_fewer(where, folders, tmp_path, monkeypatch):
    prompts, out = _many(tmp_path)
    request = _request(folders["llama"], prompts, out, 2, where)
    first = start("generate", *request, cwd=tmp_path, new_interpreters=True)  # whose command lines say what they are
    first.until(lambda: _written(out) >= 4)
    ranks = [pid for pid in processes.descendants(first.pid) if b"generate.worker" in _command(pid)]
    os.kill(ranks[-1], signal.SIGKILL)
    code, _, err = first.finish()
    assert code == 1 and "was ended by SIGKILL" in err and "answers are missing; the same command goes on" in err
    assert 4 <= len(answered(out)) < COUNT and not list(tmp_path.glob("*.part-*"))
    assert here(monkeypatch, *_request(folders["llama"], prompts, out, 1, where)) == 0
    _all_there(folders["llama"], out)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["split", "auto"])
def test_launchers_that_are_killed_again_and_again(where, folders, tmp_path):
    """Their ranks, which they leave behind, write on for a moment while the next run has begun."""
    prompts, out = _many(tmp_path)
    request = ["generate", *_request(folders["llama"], prompts, out, 2, where)]
    for lines in (1, 8):
        before = _written(out)
        _kill(start(*request, cwd=tmp_path), out, before + lines)
        _torn(out)
    code, _, err = command(*request, cwd=tmp_path)
    assert code == 0, err
    _all_there(folders["llama"], out)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# --- the files of answers, without a model ------------------------------------------------------------
def _answers(tmp_path: Path, count: int = 4) -> Answers:
    return Answers(tmp_path / "out.jsonl", [Prompt(n, None, [n], "", n) for n in range(count)])


def test_a_merge_that_was_killed_between_rename_and_removal_is_done_again(tmp_path):
    answers = _answers(tmp_path)
    assert answers.begin({}) == set()
    first, second = answers.part(), answers.part()
    Writer(Path(first + "-0")).write({"id": n, "ids": [n]} for n in (2, 0))
    kept = Path(first + "-0").read_bytes()
    assert answers.merge() == {"0", "2"}
    Path(first + "-0").write_bytes(kept)  # it had not been removed
    Writer(Path(second + "-0")).write([{"id": 0, "ids": [7]}, {"id": 1, "ids": [1]}])  # of a second run at once
    assert answers.end() == 1
    assert answered(answers.out) == {0: [0], 1: [1], 2: [2]}


class _Killed(BaseException):
    """Stands for the end of the process: after it, nothing it does reaches the disk."""


@pytest.mark.parametrize("last", range(14))
def test_a_kill_at_any_call_loses_nothing(last, tmp_path, monkeypatch):
    answers, left = _answers(tmp_path), iter(range(last))
    Writer(Path(answers.part() + "-0")).write([{"id": 3, "ids": [3]}])  # of a run before

    def until_killed(call: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            if next(left, None) is None:
                raise _Killed
            return call(*args, **kwargs)

        return called

    def a_run() -> None:
        todo = {"0", "1", "2", "3"} - answers.begin({})
        Writer(Path(answers.part() + "-0")).write({"id": int(n), "ids": [int(n)]} for n in sorted(todo))
        assert answers.end() == 0

    with monkeypatch.context() as patched:
        for owner, name in ((os, "write"), (os, "fsync"), (Path, "replace"), (Path, "unlink")):
            patched.setattr(owner, name, until_killed(getattr(owner, name)))
        with contextlib.suppress(_Killed):
            a_run()
    a_run()
    assert answered(answers.out) == {n: [n] for n in range(4)}
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_torn_line_of_the_output_is_cut_off_and_a_damaged_one_refused(tmp_path):
    answers = _answers(tmp_path)
    answers.out.write_bytes(b'{"id": 1, "ids": []}\n{"id": 2, "i')
    assert answers.begin({}) == {"1"} and answers.out.read_bytes() == b'{"id": 1, "ids": []}\n'
    answers.out.write_bytes(b'{"id": 1, "ids": []}\n\0\0\0\0\n')  # of a power cut
    assert answers.merge() == {"1"}
    answers.out.write_bytes(b'no\n{"id": 1, "ids": []}\n')
    with pytest.raises(CheckpointError, match="line 1: is no answer"):
        answers.merge()


def test_an_unfinished_run_goes_on_with_its_own_settings_only(tmp_path):
    answers = _answers(tmp_path)
    answers.begin({"seed": 0})
    answers.begin({"seed": 1})  # nothing was answered yet
    Writer(Path(answers.part() + "-0")).write([{"id": 0, "ids": []}])
    with pytest.raises(ConfigError, match=r"other settings \(seed\)"):
        answers.begin({"seed": 0})
    assert answers.begin({"seed": 1}) == {"0"}
    with pytest.raises(ConfigError, match=r"other settings \(prompts\)"):
        _answers(tmp_path, 5).begin({"seed": 1})
    (tmp_path / "out.jsonl.settings").unlink()
    Writer(Path(answers.part() + "-0")).write([{"id": "0", "ids": []}])
    with pytest.raises(ConfigError, match='an answer to "0"'):
        answers.begin({"seed": 1})


# --- wrong requests -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere", "x"], "nowhere: is no folder"),
        (["empty", "x"], "empty: has no config.json"),
        (["M"], "one of PROMPT, --ids and --prompts"),
        (["M", "x", "--ids", "1"], "one of PROMPT, --ids and --prompts"),
        (["M", "--ids", "1 x"], "no list of tokens"),
        (["M", "x", "--device-map", "moon"], "--device-map moon is not known"),
        (["M", "x", "--device-map", "[1]"], "is not known"),
        (["M", "x", "--max-memory", "cpu"], "is not PLACE=SIZE"),
        (["M", "x", "--max-memory", "cpu=1GB", "--device-map", "disk"], "--max-memory has no meaning"),
        (["M", "x", "--dtype", "int3"], "--dtype int3"),
        (["M", "x", "--quantization", "int3"], "--quantization int3"),
        (["M", "x", "--greedy", "--top-p", "0.5"], "--greedy draws nothing"),
        (["M", "x", "--temperature", "0"], "--temperature 0"),
        (["M", "x", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["M", "x", "--nproc", "0"], "--nproc 0"),
        (["M", "x", "--batch", "2"], "--batch 2"),
        (["M", "--prompts", "good.jsonl"], "--prompts and --out go together"),
        (["M", "--prompts", "none.jsonl", "--out", "o"], "none.jsonl: cannot be read"),
        (["M", "--prompts", "bad.jsonl", "--out", "o"], "bad.jsonl, line 3: is no JSON"),
        (["M", "--prompts", "twice.jsonl", "--out", "o"], "twice.jsonl, line 2: id 2 is that of line 1, too"),
        (["M", "--prompts", "both.jsonl", "--out", "o"], "both.jsonl, line 1: is no object with either"),
        (["M", "--prompts", "blank.jsonl", "--out", "o"], "blank.jsonl: has no prompts"),
        (["M", "--prompts", "good.jsonl", "--out", "good.jsonl/o"], "--out good.jsonl/o: cannot be written"),
        (["M", "--prompts", "good.jsonl", "--out", "empty"], "--out empty: is a folder"),
        (["M", "--prompts", "good.jsonl", "--out", "no/o"], "--out no/o: cannot be written"),
        # These are known when a rank looks closer.
        (["M", "x", "--max-memory", "cpu=1KB"], "do not hold"),
        (["M", "x", "--device-map", '{"nothing": "disk"}'], "does not have: nothing"),
        (["M", "x", "--length", "3"], "more than --length 3"),
        (["M", "--ids", "300"], "token 300 is none of the model's 300"),
        (["G", "x", "--max-new-tokens", "128"], "more than the model's 128 positions"),
        (["M", ""], "the prompt has no tokens"),
        (["weightless", "--ids", "1"], "weightless"),
        (["broken", "--ids", "1"], "transformers cannot read it"),
        (["M", "--prompts", "empty.jsonl", "--out", "o"], "empty.jsonl, line 2: the prompt has no tokens"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(args, message, folders, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("weightless").mkdir()
    Path("weightless", "config.json").write_bytes(Path(folders["llama"], "config.json").read_bytes())
    Path("broken").mkdir()
    write(Path("broken", "config.json"), {"architectures": ["LlamaForCausalLM"]})
    write(Path("good.jsonl"), {"prompt": "x"})
    write(Path("bad.jsonl"), {"prompt": "x"}, {"prompt": "y"}, '{"prompt":')
    write(Path("twice.jsonl"), {"id": 2, "ids": [1]}, {"ids": [1]})
    write(Path("both.jsonl"), {"prompt": "x", "ids": [1]})
    write(Path("blank.jsonl"), "", "")
    write(Path("empty.jsonl"), {"prompt": "x"}, {"prompt": ""})
    args = [{"M": folders["llama"], "G": folders["gpt2"]}.get(word, word) for word in args]
    err = refused(monkeypatch, capfd, "generate", *args)
    errors = [line for line in err.splitlines() if not line.startswith("shardwise: ")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert not list(tmp_path.glob("o*"))


def test_transformers_is_asked_for_where_it_is_missing(folders, monkeypatch, capfd):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "transformers" else find(name))
    assert "pip install transformers" in refused(monkeypatch, capfd, "generate", folders["llama"], "x")


@pytest.mark.slow
def test_ranks_that_refuse_say_so_in_one_line(folders, tmp_path):
    args = ["generate", folders["llama"], "x", "-n", 2, "--device-map", "split", "--max-memory", "cpu=1KB"]
    code, out, err = command(*args, cwd=tmp_path)
    assert code == 2 and out == ""
    assert [line[:7] for line in err.splitlines() if not line.startswith("shardwise: 2 ranks")] == ["error: "]


def test_a_failure_on_the_way_ends_with_1(folders, tmp_path, monkeypatch, capfd):
    from shardwise.cli.generate import worker
    from shardwise.errors import OffloadError

    def fails(*args: Any) -> None:
        raise OffloadError("the disk is gone", where="here")

    monkeypatch.setattr(worker, "_generate", fails)
    prompts = write(tmp_path / "in.jsonl", {"ids": [1]})
    assert here(monkeypatch, folders["llama"], "--prompts", prompts, "--out", tmp_path / "o") == 1
    err = capfd.readouterr().err
    assert "error: here: the disk is gone" in err and "1 of 1 answers are missing" in err and "Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done(folders, tmp_path):
    prompts, out = _many(tmp_path)
    process = start("generate", *_request(folders["llama"], prompts, out, 1, "auto"), cwd=tmp_path)
    process.until(lambda: _written(out) >= 2)
    process.send_signal(signal.SIGINT)
    code, _, err = process.finish()
    assert code == 130 and "stopped by Ctrl-C" in err and "the same command goes on" in err and "Traceback" not in err
    assert 2 <= len(answered(out)) < COUNT


@pytest.mark.slow
def test_two_ranks_stream_one_text(folders, tmp_path):
    args = ["generate", folders["gpt2"], "the quick", "-n", 2, "--device-map", "split", "--max-new-tokens", NEW]
    code, out, err = command(*args, cwd=tmp_path)
    assert code == 0, err
    assert out == text_alone(folders["gpt2"], "the quick") + "\n" and "memory, most of 2 ranks: " in err
