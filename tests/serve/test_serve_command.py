"""`opencola serve` as a process: it says where it is, ends what it has begun, and leaves with a word or none."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from command_line import command, environment
from serving import COLA, WAIT, cola, tokenizer

from opencola.checkpoints import official, settings
from opencola.commands import main as cli
from opencola.commands.serve import name_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mine"
    own = tokenizer()
    official.save(cola(own.vocab_size), folder)
    own.save(folder)
    settings.save_sampling(COLA, folder)
    return folder


@contextlib.contextmanager
def started(model: Path, *argv: str, **env: str) -> "Iterator[tuple[subprocess.Popen[str], str]]":
    """The command, and its URL when it is ready."""
    words = command("serve", "--model", str(model), "--port", "0", "--threads", "1", *argv)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env={**environment(), **env}, **pipes) as process:  # type: ignore[call-overload]
        try:
            line = process.stdout.readline()
            ready = re.fullmatch(r"serving mine at (http://127\.0\.0\.1:\d+)\n", line)
            assert ready, line + process.stderr.read()
            yield process, ready[1]
        finally:
            process.kill()


def test_a_signal_ends_it_when_what_is_begun_is_written(model: Path) -> None:
    asked = {"prompt": "The fox", "stream": True, "max_tokens": 100, "ignore_eos": True, "seed": 1}
    with started(model, "--max-batch", "1", OPENCOLA_API_KEY="secret") as (process, url):
        key = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{url}/v1/models").status_code == 401
        told = httpx.get(f"{url}/v1/models", headers=key).json()["data"][0]
        assert told["id"] == "mine" and told["opencola"]["sampling"]["steps"]["default"] == COLA.steps
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, headers=key, timeout=WAIT) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            said = [line.removeprefix("data: ") for line in lines if line]
        assert said[-1] == "[DONE]" and json.loads(said[-2])["choices"][0]["finish_reason"] == "length"
        assert len(said) > 12
        assert process.wait(WAIT) == 0
        logged = [json.loads(line) for line in process.stderr.read().splitlines()]
    assert [(line["path"], line["status"]) for line in logged] == [
        ("/v1/models", 401),
        ("/v1/models", 200),
        ("/v1/completions", 200),
    ]
    assert logged[-1]["completion_tokens"] == 100


@pytest.mark.slow  # another process that loads all
def test_a_second_signal_ends_it_at_once(model: Path) -> None:
    asked = {"prompt": "The fox", "stream": True, "max_tokens": 100_000, "ignore_eos": True}
    with (
        started(model) as (process, url),
        httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=WAIT) as response,
    ):
        lines = response.iter_lines()
        assert next(lines)
        process.send_signal(signal.SIGINT)
        with pytest.raises(httpx.ConnectError):  # it listens no more, and writes on
            while True:
                httpx.get(f"{url}/health")
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT) == 130


def test_a_port_that_is_taken(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--model", str(model), "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"port {port}" in said and "in use" in said
    assert cli.main(["serve", "--model", str(model), "--host", "no.such.host.invalid"]) == 2
    assert cli.main(["serve", "--model", str(model), "--port", "65536"]) == 2
    assert "--port" in capsys.readouterr().err


def test_without_its_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith(("opencola.serve", "opencola.commands.serve"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("fastapi", "starlette", "uvicorn", "prometheus_client", "pydantic"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["serve"]) == 2
    said = capsys.readouterr()
    assert said.err == "error: the server's packages are not installed: pip install 'opencola[serve]'\n"
    assert not said.out


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs" / "mine")
    assert name_of(Path(".")) == name_of(tmp_path / "runs" / "mine") == "mine"
    assert name_of(Path("OWNER/NAME")) == "OWNER/NAME"
    assert os.getcwd().endswith("mine")
