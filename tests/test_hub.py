"""The hub: model cards, and uploads to a server on this machine that answers as the hub does."""

import base64
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import ModelCard

import lexibit
from lexibit import LexibitConfig, LexibitError, checkpoint, hub
from lexibit.files import write_json

CONFIG = LexibitConfig(scheme="linear", bits=3, groups="row", levels_dtype="float16")
BASE = """---
license: mit
language: en
tags: [bert]
model-index:
- name: base
  results:
  - task: {type: text-classification}
    dataset: {type: glue, name: GLUE}
    metrics: [{type: accuracy, value: 0.9}]
---

# The base

Its own words.
"""


@pytest.fixture
def packed(float_folder, tmp_path):
    """A function that quantizes a tiny model whose folder has this README."""

    def make(readme=None):
        source = float_folder()
        if readme is not None:
            (source / "README.md").write_text(readme)
        checkpoint.quantize_to(source, tmp_path / "packed", CONFIG, progress=False)
        return tmp_path / "packed"

    return make


# cards -----------------------------------------------------------------------------------------------


def test_a_card_says_what_it_is_and_keeps_the_base_models_own(packed):
    folder = packed(BASE)
    text = hub.card(folder, "me/tiny", "you/base")
    data = ModelCard(text).data.to_dict()
    assert data == {
        "license": "mit",
        "language": "en",
        "library_name": "transformers",
        "base_model": "you/base",
        "base_model_relation": "quantized",
        "tags": ["bert", "lexibit", "quantized"],
    }
    contents = checkpoint.inspect(folder)
    for said in (
        "# me/tiny\n",
        "[you/base](https://huggingface.co/you/base)",
        "| scheme | linear |",
        "| bits of a code | 3 |",
        "| weights that share levels | row |",
        "| calibrated on text | no |",
        f"| size on disk | {(folder / 'model.safetensors').stat().st_size:,} bytes |",
        f"{contents.bits_per_weight:.3f} stored bits",
        'BertForSequenceClassification.from_pretrained("me/tiny")',
        "# The base\n\nIts own words.",
    ):
        assert said in text
    assert "accuracy" not in text
    assert (folder / "README.md").read_text() == BASE


def test_a_card_without_a_readme_and_the_code_in_it_runs(packed, monkeypatch):
    folder = packed()
    text = hub.card(folder)
    assert ModelCard(text).data.to_dict() == {
        "library_name": "transformers",
        "tags": ["lexibit", "quantized"],
    }
    assert "# packed\n" in text
    assert "own card" not in text
    monkeypatch.chdir(folder.parent)
    found = {}
    exec(text.partition("```python\n")[2].partition("```")[0], found)
    assert lexibit.nn.codebooks(found["model"])
    assert found["tokenizer"]("w5")["input_ids"] == [1, 5, 2]


def test_a_card_that_was_written_is_left_as_it_is(packed, run):
    folder = packed(BASE)
    assert run("report", folder, "--card", "--name", "me/tiny", "--base-model", "you/base", "--write")[0] == 0
    written = (folder / "README.md").read_text()
    assert written == run("report", folder, "--card")[1] == hub.card(folder, "other/name", "you/base")
    with pytest.raises(LexibitError, match="has another base_model already"):
        hub.card(folder, base_model="they/base")


def test_a_card_lists_scores(packed, run, fails, tmp_path):
    folder, scores = packed(BASE), tmp_path / "scores.json"
    score = {"metric": "f1", "value": 88.125, "low": 86.0, "high": 90.5, "examples": 408, "higher": True}
    write_json(scores, {"task": "mrpc", "split": "dev", "scores": {"a/b|c": [score]}})
    line = "| b\\|c | mrpc (dev) | f1 | 88.12 (86.00 to 90.50) | 408 |"
    assert line in run("report", folder, "--card", "--scores", scores)[1].splitlines()
    assert run("report", folder, "--card", "-o", tmp_path / "card.md")[0] == 0
    assert (tmp_path / "card.md").read_text() == hub.card(folder)
    hub.write_card(folder, hub.card(folder))
    assert "without the line" in fails("report", folder, "--card", "--scores", scores)


def test_no_card_without_codes_or_of_a_broken_readme(packed, tmp_path):
    folder = packed("---\ntags: [a\n---\n")
    with pytest.raises(LexibitError, match=r"README\.md: cannot be read"):
        hub.card(folder)
    with pytest.raises(LexibitError, match="holds no weights in codes"):
        hub.card(tmp_path / "float")


# uploads ---------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """What the hub answers to those who create a repository and commit to it."""

    def do_POST(self):
        server = self.server
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        server.asked.append(self.path)
        if self.headers.get("Authorization") != "Bearer right":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            server.created.append(json.loads(sent))
            return self.answer(200, {"url": f"{server.url}/me/tiny"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/models/me/tiny/preupload/main":
            files = [file["path"] for file in json.loads(sent)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer(200, {"files": [{"path": path} | regular for path in files]})
        if self.path == "/api/models/me/tiny/commit/main":
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(
                200, {"success": True, "commitOid": "1" * 40, "commitUrl": f"{server.url}/me/tiny/commit/1"}
            )
        return self.answer(404, {"error": self.path})

    def answer(self, status, value):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as made:
        made.url = f"http://127.0.0.1:{made.server_port}"
        made.asked, made.created, made.files = [], [], {}
        thread = Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def lexibit_push(url, *arguments):
    """The command in a process of its own: the hub's client reads its settings once."""
    settings = {"HF_ENDPOINT": url, "HF_TOKEN": "right", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    source = {"PYTHONPATH": str(Path(lexibit.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-m", "lexibit", "push", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | settings | source,
        timeout=120,
    )


def test_a_folder_is_uploaded_with_its_card(packed, server, tmp_path):
    folder = packed(BASE)
    done = lexibit_push(server.url, folder, "me/tiny", "--private", "--base-model", "you/base", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"url": f"{server.url}/me/tiny"}
    assert server.created[0]["name"] == "tiny"
    assert server.created[0]["organization"] == "me"
    assert "private" in str(server.created[0])
    assert server.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    card = ModelCard(server.files["README.md"].decode())
    assert card.data.base_model == "you/base"
    assert "# me/tiny" in card.text
    # what was uploaded loads
    (tmp_path / "down").mkdir()
    for name, content in server.files.items():
        (tmp_path / "down" / name).write_bytes(content)
    assert checkpoint.verify(tmp_path / "down").weights == 16
    checkpoint.load_quantized(tmp_path / "down")


def test_a_damaged_folder_or_a_bad_name_is_not_uploaded(packed, fails, tmp_path):
    folder = packed()
    assert "no hub name: write USER/NAME" in fails("push", folder, "a/b/c")
    offline = fails("push", folder, "me/tiny")
    assert "me/tiny: the hub did not take it: " in offline
    assert "hf auth login" in offline
    assert not (folder / "README.md").exists()
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-40] ^= 1
    file.write_bytes(raw)
    assert "has other bytes than were written" in fails("push", folder, "me/tiny")
    assert "holds no weights in codes" in fails("push", tmp_path / "float", "me/tiny")
