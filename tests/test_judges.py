"""Rewards that read the prompt."""

import base64
import http.server
import io
import json
import socket
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from ddpo_lib import encoders, judges, rewards
from ddpo_lib.book import paths

PROMPTS = ["an old person", "a person with glasses"]


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 64) * 2 - 1


def test_clip_alignment_is_the_cosine(images):
    clip = encoders.load_clip(paths.TOY / "clip", "cpu")
    reward = rewards.checked(judges.clip_alignment(clip))
    pictures, texts = encoders.embed_images(clip, images), encoders.embed_texts(clip, PROMPTS)
    expected = torch.cosine_similarity(pictures, texts)
    assert torch.allclose(reward(images, PROMPTS), expected, atol=1e-6)
    assert not torch.allclose(reward(images, PROMPTS[::-1]), expected, atol=1e-4)


def test_pick_score_is_the_scaled_cosine_of_a_clip_folder(images, tmp_path, letter_tokenizer):
    """On a folder as transformers writes it, with random weights."""
    tokenizer = letter_tokenizer(tmp_path)
    small = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "projection_dim": 8,
    }  # fmt: skip
    text = small | {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(
        text_config=text, vision_config=small | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )  # fmt: skip
    model = CLIPModel(config).eval()
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = CLIPProcessor(CLIPImageProcessor(**size), tokenizer)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")

    reward = rewards.checked(judges.pick_score(str(tmp_path / "model"), "cpu"))
    levels = list(rewards.to_uint8(images).numpy())
    seen = processor(images=levels, text=PROMPTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**seen).logits_per_image.diagonal()
    assert torch.allclose(reward(images, PROMPTS), expected, atol=1e-4)
    with pytest.raises(FileNotFoundError, match="cannot get .*/nowhere"):
        judges.pick_score(str(tmp_path / "nowhere"))


def test_packages_are_asked_picture_by_picture(images, monkeypatch):
    model = SimpleNamespace(score=lambda prompt, picture: len(prompt) + picture.size[0])
    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=lambda name: model))
    assert rewards.checked(judges.image_reward())(images, PROMPTS).tolist() == [77, 85]
    hps = SimpleNamespace(score=lambda picture, prompt, hps_version: [len(prompt)])
    monkeypatch.setitem(sys.modules, "hpsv2", hps)
    assert rewards.checked(judges.human_preference())(images, PROMPTS).tolist() == [13, 21]


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "hpsv2", None)
    with pytest.raises(ImportError, match="needs the package hpsv2.*: pip install hpsv2"):
        judges.human_preference()


class Judge(http.server.BaseHTTPRequestHandler):
    """Answers as the server's `answers` say, in turn: a status and a text."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), asked))
        status, text = self.server.answers.pop(0)
        body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(judges.time, "sleep", lambda _: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge) as own:
        own.asked, own.answers = [], []
        own.address = f"http://127.0.0.1:{own.server_port}/v1"
        threading.Thread(target=own.serve_forever, daemon=True).start()
        yield own
        own.shutdown()


def test_a_model_behind_an_address_is_shown_each_image_and_asked(images, server):
    server.answers = [(200, "8"), (200, "I would say 3.5 out of 10.")]
    judge = rewards.checked(judges.ask(server.address, "llava", key="secret", n_parallel=1))
    assert judge(images, PROMPTS).tolist() == [8.0, 3.5]
    (path, headers, asked), _ = server.asked
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    text, picture = asked["messages"][0]["content"]
    assert PROMPTS[0] in text["text"]
    url = picture["image_url"]["url"].removeprefix("data:image/png;base64,")
    shown = torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(url)))))
    assert shown.equal(rewards.to_uint8(images)[0])
    assert asked["model"] == "llava"


def test_a_busy_server_is_asked_again(images, server):
    server.answers = [(503, ""), (429, ""), (200, "7")]
    assert judges.ask(server.address, "llava")(images[:1], PROMPTS[:1]) == [7.0]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("answers", "error", "said"),
    [
        ([(200, "I cannot judge people.")], ValueError, "gave no number for 'an old person'"),
        ([(401, "")], ConnectionError, "no answer from .*HTTP Error 401"),
        ([(500, "")] * 3, ConnectionError, "no answer from .*HTTP Error 500.*start the server"),
    ],
)
def test_refusals_and_failures_are_told(images, server, answers, error, said):
    server.answers = list(answers)
    with pytest.raises(error, match=said):
        judges.ask(server.address, "llava")(images[:1], PROMPTS[:1])
    assert not server.answers


def test_a_judge_that_is_down_or_silent_is_told(images, server, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        with pytest.raises(ConnectionError, match=f"no answer from {address}"):
            judges.ask(address, "llava", timeout=0.3)(images[:1], PROMPTS[:1])
        closed.listen()  # takes the connection and never answers
        with pytest.raises(ConnectionError, match="timed out.*raise the timeout"):
            judges.ask(address, "llava", timeout=0.3)(images[:1], PROMPTS[:1])
