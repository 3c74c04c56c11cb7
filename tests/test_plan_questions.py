"""``shardwise plan`` as somebody uses it who does not know it: a command for each question, a line for each mistake.

The model is small and of a function, so that an answer takes a second or two; answers are kept between tests.
"""

from __future__ import annotations

import functools
import json
import os

import pytest
from typer.testing import CliRunner

import browser
from plan_models import MANY, VOCABULARY, Small
from shardwise.cli import app
from slowly import slow

MACHINE = ("--devices", "4xA100-40GB")
MODEL = "plan_models:small"
PARAMETERS = sum(p.numel() for p in Small().parameters())
FP32, BF16 = 4, 2


@functools.cache
def ask(*args: str, model: str = MODEL, machine: tuple[str, ...] = MACHINE):
    """Exit code, facts (of an answer), and what it said on the way."""
    result = CliRunner().invoke(app, ["plan", model, *machine, *args, "--json"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, json.loads(result.stdout) if result.stdout else None, result.stderr


def answered(*args: str, **more):
    code, facts, said = ask(*args, **more)
    assert code == 0, said
    return facts


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The same answer as a text and as a page."""
    page = tmp_path_factory.mktemp("page") / "plan.html"
    asked = ["--batch", "8", "--strategy", "zero3", "--html", str(page)]
    result = CliRunner().invoke(app, ["plan", MODEL, *MACHINE, *asked], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.stderr
    return result.stdout, page


def what_ifs():
    """Changes of one thing each, in one question: by name, and ``as asked``."""
    changes = ("nodes=2", "reduce_dtype=bf16", "offload_optimizer=cpu", "activation_checkpointing=true")
    return answered("--batch", "32", "--strategy", "zero2", *(w for c in changes for w in ("--what-if", c)))


def test_does_it_fit_and_which_is_best():
    facts = answered("--batch", "2")
    assert facts["fits"] and facts["best"]["strategy"] in facts["verdict"]
    fitting = [row for row in facts["rows"] if row["fits"]]
    assert {row["strategy"].split(",")[0] for row in fitting} == {"ddp", "zero1", "zero2", "zero3"}
    speeds = [row["timing"]["tokens_per_s"] for row in fitting]
    assert speeds == sorted(speeds, reverse=True) and facts["best"] == facts["rows"][0]
    assert all(row["timing"]["sources"] for row in fitting)


def test_states_are_those_of_the_formulas():
    """Masters, and the two states of Adam: 12 bytes for each parameter, split or not."""
    facts = answered("--batch", "2")
    rows = {row["strategy"]: row for row in facts["rows"]}
    for preset, parts in (("ddp", 1), ("zero3", 4)):
        between = rows[f"{preset},param_dtype=bf16"]["between"]
        states = between["parameters"] + between["optimizer"]
        copies = 0 if preset == "zero3" else BF16 * PARAMETERS
        assert states == pytest.approx(3 * FP32 * PARAMETERS / parts + copies, rel=0.02)
        assert rows[f"{preset},param_dtype=bf16"]["save"] == states


def test_twice_the_rows_keep_twice_the_activations():
    one = answered("--batch", "8", "--strategy", "zero3")
    two = answered("--batch", "16", "--strategy", "zero3")
    assert one["rows"] == 8 and two["rows"] == 16

    def activations(found):
        return found["device"]["states"]["activations"]

    assert activations(two) == pytest.approx(2 * activations(one), rel=0.05)


def test_which_state_is_the_peak_and_when_and_what_evaluation_and_saving_take(shown):
    facts = answered("--batch", "8", "--strategy", "zero3")
    peak = facts["device"]
    assert peak["phase"] in ("forward", "backward", "step") and sum(peak["states"].values()) == peak["bytes"]
    evaluation = facts["evaluation"]
    assert evaluation["phase"] == "forward" and evaluation["bytes"] < peak["bytes"]
    logits = 8 * 128 * VOCABULARY * FP32
    assert logits < evaluation["states"]["activations"] < 4 * logits
    assert 0 < facts["save"] < 4 * FP32 * PARAMETERS
    text, _ = shown
    for part in ("peak of the device", "activations", "evaluation", "an asynchronous save", "outside of torch",
                 "waits for the network", "counted", "datasheet", "bound by"):  # fmt: skip
        assert part in text


def test_what_checkpointing_saves_and_costs():
    facts = what_ifs()
    plain, kept = facts["as asked"], facts["activation_checkpointing=true"]
    assert kept["device"]["states"]["activations"] < plain["device"]["states"]["activations"]
    assert kept["timing"]["compute"] > plain["timing"]["compute"]
    assert kept["between"] == plain["between"]


def test_what_offload_costs_in_time():
    facts = what_ifs()
    plain, moved = facts["as asked"], facts["offload_optimizer=cpu"]
    assert moved["timing"]["seconds"] > plain["timing"]["seconds"]
    assert moved["between"]["optimizer"] == 0 < plain["between"]["optimizer"]
    assert moved["host"]["bytes"] >= 3 * FP32 * PARAMETERS / 4


def test_another_node_and_the_dtype_of_reductions():
    facts = what_ifs()
    plain, nodes, reduced = facts["as asked"], facts["nodes=2"], facts["reduce_dtype=bf16"]
    assert nodes["world"] == 2 * plain["world"]
    assert nodes["between"]["optimizer"] == pytest.approx(plain["between"]["optimizer"] / 2, rel=0.02)
    assert nodes["timing"]["busy"]["network"] > plain["timing"]["busy"]["network"]
    assert reduced["timing"]["busy"]["network"] < plain["timing"]["busy"]["network"]


def test_how_much_host_memory_and_disk_and_how_long_the_disk_takes():
    """Masters and the states of Adam, read and written in every step: none is faster than its disk, in the long run."""
    disk = ("--nvme", "3.5GB/s,4TB", "--host-memory", "64GB")
    facts = answered("--batch", "2", "--strategy", "zero3,offload_optimizer=nvme", *disk)
    assert facts["disk"] == pytest.approx(3 * FP32 * PARAMETERS / 4, rel=0.02)
    assert 0 < facts["host"]["bytes"] < facts["host_capacity"] == 16e9 and facts["disk_capacity"] == 1e12
    assert facts["device"]["states"]["parameters"] == pytest.approx(BF16 * PARAMETERS / 4, rel=0.02)
    timing = facts["timing"]
    of_each = 3.5e9 / 4
    assert timing["busy"]["disk"] == pytest.approx(2 * facts["disk"] / of_each, rel=0.02)
    assert timing["bound"] == "disk" and timing["seconds"] >= 0.99 * timing["busy"]["disk"]


@pytest.mark.slow
def test_a_disk_that_is_too_small():
    code, facts, said = ask("--batch", "2", "--strategy", "zero3,offload_optimizer=nvme", "--nvme", "3.5GB/s,4MB")
    assert code == 1 and facts["lacks"] == "disk", said


def test_over_how_many_ranks_to_split():
    facts = answered("--batch", "2", "--strategy", "hsdp,shard_size=2", "--what-if", "shard_size=4")
    two, four = facts["as asked"], facts["shard_size=4"]
    assert four["between"]["optimizer"] == pytest.approx(two["between"]["optimizer"] / 2, rel=0.02)
    assert four["device"]["bytes"] < two["device"]["bytes"]


def test_what_bounds_a_step():
    """So small a model waits for the calls; a large batch for the device; with an update on the host, for the host."""
    bound = {}
    for name, batch, strategy in (
        ("calls", "8", "zero3"), ("work", "512", "zero3"), ("host", "2", "zero3,offload_optimizer=cpu"),
    ):  # fmt: skip
        timing = answered("--batch", batch, "--strategy", strategy)["timing"]
        bound[name] = timing["bound"]
        assert timing["seconds"] >= 0.99 * max(timing["compute"], *timing["busy"].values())
    assert bound == {"calls": "launch", "work": "compute", "host": "host"}


@pytest.mark.parametrize(
    ("what", "least", "model"),
    [("batch", 64, MODEL), slow("layers", MANY, "plan_models:deep"), slow("seq", 128, MODEL)],
)
def test_how_far_one_can_go(what, least, model):
    (found,) = answered("--max", what, "--strategy", "zero3", model=model)[what].values()
    assert found > least


@pytest.mark.slow
def test_why_not_another():
    facts = answered("--batch", "2", "--why", "zero3")
    assert facts["this"]["strategy"].startswith("zero3") and "zero3" in facts["answer"]


def test_nothing_fits():
    code, facts, _ = ask("--batch", "100000", "--strategy", "zero3")
    assert code == 1 and facts["lacks"] == "device" and facts["needs"][1] > facts["capacity"]


def test_adapters_against_full_training():
    pytest.importorskip("peft")
    facts = answered("--batch", "2", "--strategy", "ddp", "--what-if", "lora=r=8,targets=q+v")
    full, adapted = facts["as asked"], facts["lora=r=8,targets=q+v"]
    # Of what is frozen only the fp32 values are left, which stand beside those that compute in bf16.
    assert adapted["between"]["optimizer"] < 0.4 * full["between"]["optimizer"]
    assert adapted["needs"][1] < full["needs"][1]


def test_only_an_answer_is_on_stdout():
    _, _, said = ask("--batch", "8", "--strategy", "zero3")
    assert "a model's own words" in said


def test_an_answer_as_a_page(shown):
    text, page = shown
    written = page.read_text()
    assert MODEL in written and "peak of the device" in written and "viewport" in written
    assert "peak of the device" in text


@pytest.mark.skipif(browser.installed() is None, reason=f"no browser: none of {', '.join(browser.NAMES)} is installed")
def test_the_page_in_a_browser(shown, tmp_path):
    """A wide table scrolls in its own frame, on a phone too; both themes; no script, no request."""
    _, page = shown
    with browser.opened(tmp_path / "profile") as tab:
        for width, phone, dark in ((1100, False, False), (390, True, True)):
            tab.look(width, 800, dark=dark, phone=phone)
            tab.open(page)
            tab.until("document.body && document.body.innerText.includes('peak of the device')")
            assert tab.run("document.documentElement.scrollWidth") <= width
            light = tab.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
            assert (light < 60) == dark
        assert tab.problems == []
        assert [a for a in tab.requests if not a.startswith(("data:", page.as_uri()))] == []


ERRORS = {
    "unknown device": (("--devices", "8xH1000"), "known are"),
    "no number of devices": (("--devices", ""), "8xH100-80GB"),
    "negative nodes": (("--nodes", "-1"), "--nodes -1"),
    "negative rows": (("--batch", "-3"), "--batch -3"),
    "no rows": (("--batch", "0"), "--batch 0"),
    "negative length": (("--seq", "-3"), "--seq -3"),
    "negative memory": (("--host-memory", "-3GB"), "no size"),
    "no memory": (("--host-memory", ""), "no size"),
    "a disk without a rate": (("--nvme", "4TB"), "how fast"),
    "a rate that is none": (("--network", "fast"), "no rate"),
    "a norm that is none": (("--clip", "nan"), "no norm"),
    "rows that cannot be divided": (("--global-batch", "7"), "cannot be divided"),
    "micro-batches that cannot be": (("--global-batch", "12", "--batch", "2"), "not whole micro-batches"),
    "unknown optimizer": (("--optimizer", "adamww"), "did you mean 'adamw'?"),
    "unknown precision": (("--precision", ""), "--precision"),
    "adapters without a rank": (("--lora", "r=x"), "whole number"),
    "unknown preset": (("--strategy", "zero9"), "zero9"),
    "empty strategy": (("--strategy", ""), "preset"),
    "unknown key": (("--strategy", "zero2,offload=cpu"), "offload"),
    "disks that nobody told of": (("--strategy", "zero3,offload_optimizer=nvme"), "--nvme 3.5GB/s,4TB"),
    "matrices cut anywhere": (("--strategy", "zero3", "--optimizer", "muon"), "layout"),
    "a shard size that divides nothing": (("--strategy", "hsdp,shard_size=3"), "3"),
    "unknown question": (("--max", "speed"), "one of batch, seq, layers"),
    "two questions": (("--max", "batch", "--why", "zero2"), "two questions"),
    "two strategies": (("--strategy", "zero3", "--why", "zero2"), "two questions"),
    "looks for what is given": (("--max", "batch", "--batch", "2"), "leave one out"),
    "changes nothing": (("--strategy", "zero3", "--what-if", "nodez=2"), "did you mean 'nodes'?"),
    "changes to nothing": (("--strategy", "zero3", "--what-if", ""), "--what-if"),
    "changes to no number": (("--strategy", "zero3", "--what-if", "nodes=many"), "nodes"),
    "two machines": (("--calibrate",), "leave one out"),
    "nowhere to write": (("--html", "/nowhere/at/all.html"), "cannot be written"),
}  # fmt: skip


def one_line(*args: str, model: str = MODEL) -> str:
    result = CliRunner().invoke(app, ["plan", model, *MACHINE, *args])
    lines = [line for line in result.stderr.splitlines() if line != "a model's own words"]
    assert result.exit_code == 2 and not result.stdout, (result.stdout, result.exception)
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in result.stderr, result.stderr
    return lines[0]


@pytest.mark.parametrize("mistake", ERRORS)
def test_mistakes_are_one_line(mistake):
    args, says = ERRORS[mistake]
    assert says in one_line(*args)


MODELS = {
    "": "no model was named",
    "gpt22": "did you mean 'gpt2'?",
    "nowhere:f": "cannot be imported",
    "plan_models:nothing": "has no 'nothing'",
    "plan_models:cannot_be_built": "line 1",
    "plan_models:builds_nothing": "not (model, inputs)",
    "plan_models:without_rows": "no tensor with rows",
    "plan_models:frozen": "no parameter that is trained",
    "plan_models:needs_values": "asks for them",
    "plan_models:cannot_run": "cannot go ahead",
    "plan_models:one_way": "this model cannot go back",
    "plan_models:hooked": "no gradients here",
    "x" * 5000: "there is no model",
}


@pytest.mark.parametrize("model", MODELS, ids=lambda name: name[:30] or "empty")
def test_models_that_cannot_be(model):
    """Also one that raises inside of a backward: on the planned device that ends the process it is in."""
    assert MODELS[model] in one_line("--strategy", "zero2", model=model)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not a configuration"),
        ("[1]", "no keys"),
        ("{}", "names no model"),
        ('{"model_type": "lama"}', "did you mean"),
        ('{"model_type": "llama", "architectures": ["Lama"]}', "no class"),
        ('{"model_type": "llama", "hidden_size": -8}', "hidden size"),
        ("\xff\0", "not a configuration"),
        (None, "no config.json"),
    ],
    ids=["broken", "a list", "no architecture", "unknown", "unknown class", "negative", "bytes", "none"],
)
def test_configurations_that_are_none(tmp_path, text, says):
    pytest.importorskip("transformers")
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert says in one_line(model=str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is readable for root")
def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "config.json").chmod(0)
    assert "not a configuration" in one_line(model=str(tmp_path))
