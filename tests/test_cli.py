"""The command line as a user meets it: exit codes, one line for each expected fault, nothing heavy for --help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgetune import __version__, cli
from tests.conftest import Call

ROOT = Path(__file__).parents[1]
VERBS = ("init", "plan", "run", "adapt", "compress", "export", "generate", "report", "gate", "diff",
         "doctor", "bench", "score", "bench-http", "history")  # fmt: skip
HEAVY = ("torch", "transformers", "numpy", "onnx", "onnxruntime", "gguf", "llama_cpp", "peft", "bitsandbytes")
IN_CHILD = """
import sys
from edgetune.cli import main
sys.argv = ["edgetune", *sys.argv[1:]]
code = 0
try:
    main()
except SystemExit as leave:
    code = leave.code
heavy = {heavy}
print("LOADED", [name for name in heavy if name in sys.modules], file=sys.stderr)
sys.exit(code)
""".replace("{heavy}", repr(HEAVY))


def child(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", IN_CHILD, *arguments], capture_output=True, text=True, timeout=120, cwd=folder,
        check=False,
    )  # fmt: skip


def recipe(folder: Path, **changes: Any) -> str:
    def row(n: int) -> str:
        return json.dumps({"instruction": "JSON.", "input": f"set light to {n}", "output": f'{{"level":{n}}}'}) + "\n"

    (folder / "t.jsonl").write_text("".join(map(row, range(5))))
    (folder / "h.jsonl").write_text("".join(map(row, range(50, 53))))
    raw = {
        "name": "a",
        "base": str(folder / "nowhere"),
        "data": {"train": str(folder / "t.jsonl"), "heldout": str(folder / "h.jsonl")},
        "candidates": {"q4": {"export": {"gguf": {}}}},
    } | changes
    path = folder / "r.yaml"
    path.write_text(json.dumps(raw))  # JSON is YAML
    return str(path)


def one_line(err: str) -> str:
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert err.startswith("edgetune: ")
    return err.removeprefix("edgetune: ").rstrip("\n")


def test_help_loads_nothing_heavy() -> None:
    ended = child("--help")
    assert ended.returncode == 0
    assert "LOADED []" in ended.stderr
    assert "Traceback" not in ended.stderr
    for verb in VERBS:
        assert f"  {verb} " in ended.stdout


def test_python_m_edgetune() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "edgetune", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout == f"{__version__}\n"


def test_init_and_a_bad_recipe_load_nothing_heavy(tmp_path: Path) -> None:
    made = child("init", "r.yaml", folder=tmp_path)
    assert (made.returncode, "LOADED []" in made.stderr) == (0, True), made.stderr
    assert made.stdout == "wrote r.yaml; put your rows into it, then: edgetune plan r.yaml\n"
    bad = recipe(tmp_path, sead=1)
    for verb in ("plan", "run", "adapt"):
        ended = child(verb, bad, folder=tmp_path)
        assert (ended.returncode, "LOADED []" in ended.stderr) == (2, True), ended.stderr
        assert "unknown key 'sead'" in ended.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(call: Call, verb: str) -> None:
    code, out, err = call(verb, "--help")
    assert (code, err) == (0, "")
    assert f"edgetune {verb}" in out.splitlines()[0]
    assert (
        tuple(command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback)
        == VERBS
    )


def test_version(call: Call) -> None:
    assert call("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize("verb", ["plan", "run", "adapt"])
def test_a_missing_recipe(call: Call, verb: str, tmp_path: Path) -> None:
    code, out, err = call(verb, str(tmp_path / "no.yaml"))
    assert (code, out) == (2, "")
    assert one_line(err) == f"{tmp_path}/no.yaml: cannot be read (No such file or directory)"


def test_an_unknown_key(call: Call, tmp_path: Path) -> None:
    path = recipe(tmp_path, sead=1)
    code, out, err = call("run", path)
    assert (code, out) == (2, "")
    assert one_line(err) == f"{path}: unknown key 'sead'; did you mean 'seed'?"


def test_yaml_that_is_broken_is_one_line(call: Call, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: \x01\n")
    code, _, err = call("plan", str(tmp_path / "r.yaml"))
    assert code == 2
    assert "not valid YAML" in one_line(err)


@pytest.mark.parametrize(
    ("flag", "value", "key"), [("--memory-gb", "2", "adapt.memory_gb"), ("--device", "cpu", "device")]
)
def test_flags_of_a_shape_are_refused_with_a_recipe_alone(
    call: Call, tmp_path: Path, flag: str, value: str, key: str
) -> None:
    path = recipe(tmp_path)
    code, out, err = call("plan", path, flag, value)
    assert (code, out) == (2, "")
    assert one_line(err) == f"{flag} is read with --shape only; set {key} in {path}"


@pytest.mark.parametrize("verb", ["compress", "export"])
def test_a_negative_seed(call: Call, tiny_model: Any, tmp_path: Path, verb: str) -> None:
    code, _, err = call(verb, str(tiny_model.path), "--out", str(tmp_path / "out"), "--seed", "-1")
    assert code == 2
    assert "Invalid value for '--seed': Input should be greater than or equal to 0" in err


@pytest.mark.parametrize("verb", ["compress", "export"])
def test_a_row_that_the_template_refuses(call: Call, tiny_model: Any, tmp_path: Path, verb: str) -> None:
    (tmp_path / "r.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", '
                                      '"content": "ho"}], "tools": [{"name": "f"}]}\n')  # fmt: skip
    code, _, err = call(verb, str(tiny_model.path), "--out", str(tmp_path / "out"), "--rows", str(tmp_path / "r.jsonl"))
    assert code == 2
    assert one_line(err).startswith(f"{tmp_path}/r.jsonl: line 1: the chat template does not show the row's tools")
    assert not (tmp_path / "out").exists()


def test_too_few_training_rows(call: Call, tmp_path: Path) -> None:
    path = recipe(tmp_path)
    rows = (tmp_path / "t.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "t.jsonl").write_text("".join(rows[:4]))
    code, out, err = call("plan", path)
    assert (code, out) == (2, "")
    assert one_line(err) == f"{tmp_path}/t.jsonl: 4 training rows are too few; give at least 5"


def test_general_text_that_is_not_there(call: Call, tmp_path: Path) -> None:
    data = {"train": str(tmp_path / "t.jsonl"), "heldout": str(tmp_path / "h.jsonl"), "general": "none.jsonl"}
    code, out, err = call("plan", recipe(tmp_path, data=data))
    assert (code, out) == (2, "")
    assert one_line(err).startswith("none.jsonl: cannot be read (No such file or directory)")


def test_a_missing_data_file(call: Call, tmp_path: Path) -> None:
    path = recipe(tmp_path)
    (tmp_path / "h.jsonl").unlink()
    code, out, err = call("plan", path)
    assert (code, out) == (2, "")
    assert one_line(err).startswith(f"{tmp_path}/h.jsonl: cannot be read (No such file or directory)")


def test_a_leak(call: Call, tmp_path: Path) -> None:
    path = recipe(tmp_path)
    with (tmp_path / "h.jsonl").open("a") as stream:
        stream.write((tmp_path / "t.jsonl").read_text().splitlines()[2].replace("set", "SET") + "\n")
    code, _, err = call("plan", path)
    assert code == 2
    assert one_line(err).startswith(f"{tmp_path}/h.jsonl line 4 is also {tmp_path}/t.jsonl line 3 (1 such rows)")


def test_a_missing_base(call: Call, tmp_path: Path) -> None:
    code, _, err = call("run", recipe(tmp_path))
    assert code == 2
    assert "no such folder; give a folder, a .gguf file, pkg:NAME" in one_line(err)
    assert not (tmp_path / "runs").exists()


def test_debug_shows_where(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_state", {"debug": False})
    code, _, err = call("--debug", "plan", str(tmp_path / "no.yaml"))
    assert code == 2
    assert err.startswith("Traceback (most recent call last)")
    assert err.splitlines()[-1].startswith("edgetune: ")


def test_init_does_not_overwrite(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.yaml"
    assert call("init", str(path), "--base", "./model")[0] == 0
    assert "base: ./model " in path.read_text()
    path.write_text("mine")
    code, _, err = call("init", str(path))
    assert code == 2
    assert one_line(err) == f"{path} is there already; choose another name or remove it"
    assert path.read_text() == "mine"


def test_report_of_a_folder_without_one(call: Call, tmp_path: Path) -> None:
    code, _, err = call("report", str(tmp_path))
    assert code == 2
    assert one_line(err) == f"{tmp_path}/report.json cannot be read (No such file or directory)"


@pytest.mark.parametrize(
    "arguments",
    [("run", "--foo", "x.yaml"), ("plan",), ("frobnicate",), ("bench", ".", "--repeats", "0"), ("run", "a", "b")],
    ids=["unknown flag", "missing argument", "unknown verb", "out of range", "too many arguments"],
)
def test_wrong_usage_is_exit_2_without_a_traceback(call: Call, arguments: tuple[str, ...]) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert "rror" in err


def test_no_verb_shows_the_help(call: Call) -> None:
    code, out, err = call()
    assert code in (0, 2)
    assert "Usage: edgetune" in out + err


@pytest.mark.parametrize("code", [1, 3, 4])
def test_a_verb_decides_the_exit_code(call: Call, monkeypatch: pytest.MonkeyPatch, code: int, tmp_path: Path) -> None:
    from edgetune.runtime import verdict
    from edgetune.runtime.report.write import write_report
    from tests.report_sample import sample_report

    monkeypatch.setattr(verdict, "exit_code", lambda _: code)
    write_report(sample_report(n_rows=20), tmp_path)
    assert call("report", str(tmp_path))[0] == code


def test_a_place_that_cannot_be_written(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = call("init", str(tmp_path / "file" / "r.yaml"))
    assert code in (1, 2)
    one_line(err)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("compress", "{base}", "--out", "{out}", "--bits", "7"), "gptq.bits: Input should be 2, 3, 4, 5, 6 or 8"),
        (("compress", "{base}", "--out", "{out}", "--bits", "6"), "no 6 bits; set checkpoint: compressed-tensors"),
        (("compress", "{base}", "--out", "{out}", "--method", "awq"), "method 'awq' is not known; use rtn or gptq"),
        (
            ("export", "{base}", "--out", "{out}", "--format", "tflite"),
            "format 'tflite' is not known; use gguf or onnx",
        ),
        (("export", "{base}", "--out", "{out}", "--type", "Q9"), "export: gguf.type: Input should be"),
        (
            ("export", "{base}", "--out", "{out}", "--format", "tensorrt", "--compute-capability", "9.0"),
            "export: tensorrt.compute_capability.0: Input should be '7.5', '8.0'",
        ),
        (
            ("export", "{base}", "--out", "{out}", "--format", "tensorrt"),
            "precision int4 writes a checkpoint's integers",
        ),
        (
            ("export", "{base}", "--out", "{out}", "--seed", "3"),
            "--seed is not read by gguf without --rows",
        ),
        (("export", "{base}", "--out", "{out}", "--graph", "g"), "--graph is not read by gguf"),
        (("export", "{base}", "--out", "{out}", "--max-kl", "1"), "--max-kl is not read by gguf"),
        (("export", "{base}", "--check", "{out}", "--type", "F16"), "--type is not read by --check; leave it out"),
        (
            ("export", "{base}", "--out", "{out}", "--format", "onnx", "--type", "F16"),
            "--type is not read by onnx; leave it out",
        ),
        (("export", "{base}", "--out", "{base}"), "is there already; choose another folder or remove it"),
        (("compress", "./nowhere", "--out", "{out}"), "base './nowhere': no such folder"),
        (("export", "./nowhere", "--out", "{out}"), "base './nowhere': no such folder"),
        (("compress", "{base}", "--out", "{out}", "--device", "foo"), "device: torch cannot use 'foo'"),
        (("compress", "{base}", "--out", "{out}", "--device", "meta"), "device: torch cannot use 'meta'"),
        (
            ("export", "{base}", "--out", "{out}", "--gptq", "--device", "cuda:99"),
            "device: torch cannot use 'cuda:99'",
        ),
        (
            ("compress", "{base}", "--out", "{out}", "--method", "rtn", "--n-samples", "4"),
            "--n-samples is not read by rtn; leave it out",
        ),
        (
            ("compress", "{base}", "--out", "{out}", "--method", "rtn", "--rows", "r.jsonl"),
            "--rows is not read by rtn; leave it out",
        ),
        (
            ("compress", "{base}", "--out", "{out}", "--general-share", "0.5"),
            "--general-share is not read by gptq without --rows; leave it out",
        ),
        (
            ("export", "{base}", "--out", "{out}", "--gptq", "--general-share", "0.5"),
            "--general-share is not read by gguf without --rows; leave it out",
        ),
        (("compress", "{base}", "--out", "{base}", "--method", "rtn"), "is there already; choose another folder"),
    ],
)
def test_flags_are_checked_as_a_recipes_keys_are(
    call: Call, tiny_model: Any, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    out = tmp_path / "out"
    code, _, err = call(*(a.format(base=tiny_model.path, out=out) for a in arguments))
    assert code == 2
    assert says in one_line(err)
    assert not out.exists()


def test_a_folder_that_is_no_artifact(call: Call, tmp_path: Path) -> None:
    code, _, err = call("export", str(tmp_path), "--out", str(tmp_path / "out"))
    assert code == 2
    assert one_line(err).startswith(f"base '{tmp_path}': {tmp_path}/config.json cannot be read")


def test_a_failing_candidates_message_may_hold_brackets(tmp_path: Path) -> None:
    import io

    from rich.console import Console

    from edgetune.artifact import Store
    from edgetune.errors import StageError
    from edgetune.stages import Stages

    said = io.StringIO()
    stages = Stages(Store(tmp_path), tmp_path, Console(file=said, width=200))

    def fail() -> Any:
        raise StageError("run: pip install 'edgetune[gguf]', found [/usr/lib]")

    assert stages.attempt("q4", "q4: gguf", fail) is None
    assert "pip install 'edgetune[gguf]', found [/usr/lib]" in said.getvalue()
