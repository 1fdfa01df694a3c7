"""Models from the Hub: its cache, a small Hub of our own on this machine, and every failure."""

import errno
import hashlib
import http.server
import json
import shutil
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from huggingface_hub import constants, file_download, hf_api
from safetensors.torch import save_file

from ddpo_lib import encoders, hub, rewards
from ddpo_lib import policy as policies

TOY = Path(__file__).resolve().parents[1] / "data" / "toy"
COMMIT, LATER = "5a1118b5a35e744d59a4215a8c72a4d7619b9e04", "f" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub, which is out of reach."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    hub.commit.cache_clear()
    yield folder
    hub.commit.cache_clear()


@pytest.fixture
def cached(cache):
    """cached(repository, folder, commit): a folder's files as a download would have left them."""

    def put(repository, folder, commit=COMMIT, listed=False):
        home = cache / f"models--{repository.replace('/', '--')}"
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / "main").write_text(commit)
        for file in filter(lambda f: f.is_file(), folder.rglob("*")):
            blob = home / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.parent.mkdir(exist_ok=True)
            shutil.copy(file, blob)
            link = home / "snapshots" / commit / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        if listed:
            names = [str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()]
            listing = {name: {"size": 1, "blob_id": "0"} for name in names}
            (home / "trees").mkdir()
            content = {"format_version": 1, "files": listing}
            (home / "trees" / f"{commit}.json").write_text(json.dumps(content))
        return home / "snapshots" / commit

    return put


@pytest.fixture
def model(tmp_path, new_policy):
    """A policy's folder with everything at its root, as google/ddpm-* have it."""
    whole, root = tmp_path / "whole", tmp_path / "root"
    policies.save(new_policy(seed=3), whole)
    root.mkdir()
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        shutil.copy(whole / name, root)
    weights = new_policy(seed=3).unet.state_dict()
    torch.save(weights, root / "diffusion_pytorch_model.bin")
    (root / "images").mkdir()
    (root / "images" / "sample.png").write_bytes(b"no part of the model")
    return root


def loads_as(policy, source):
    loaded = policies.load(source, "cpu").unet.state_dict()
    return all(loaded[name].equal(value) for name, value in policy.unet.state_dict().items())


# ------------------------------------------------------------------------------- sources


@pytest.mark.parametrize(
    "source, place",
    [
        ("google/ddpm-church-256", ("google/ddpm-church-256", None)),
        ("google/ddpm-church-256@main", ("google/ddpm-church-256", "main")),
        (f"google/ddpm-church-256@{COMMIT}", ("google/ddpm-church-256", COMMIT)),
        ("ViT-L-14:openai", ("timm/vit_large_patch14_clip_224.openai", None)),
        ("ViT-L-14:openai@v1", ("timm/vit_large_patch14_clip_224.openai", "v1")),
        ("ViT-L-14:nobody", None),
        ("faces", None),
        ("./faces", None),
        ("/data/faces", None),
        ("~/faces", None),
        ("data/toy/faces", None),
        ("https://huggingface.co/google/ddpm-church-256", ("google/ddpm-church-256", None)),
        (
            f"https://huggingface.co/google/ddpm-church-256@{COMMIT}",
            ("google/ddpm-church-256", COMMIT),
        ),
        ("https://huggingface.co/google/ddpm-church-256/tree/main", None),
        ("https://example.org/google/ddpm-church-256", None),
    ],
)
def test_source_is_the_hubs_or_local(source, place):
    assert hub.locate(source) == place


def test_folder_that_exists_is_local_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "google" / "ddpm-church-256").mkdir(parents=True)
    assert hub.locate("google/ddpm-church-256") is None
    assert hub.commit("google/ddpm-church-256") is None
    assert str(hub.fetch("policy", "google/ddpm-church-256")) == "google/ddpm-church-256"


# ------------------------------------------------------------------------------- warm cache


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_warm_cache_needs_no_network(cached, model, new_policy, revision, listed):
    cached("tiny/church", model, listed=listed)
    source = "tiny/church" + revision
    assert hub.commit(source) == COMMIT
    assert loads_as(new_policy(seed=3), source)


def test_pinned_commit_stays_when_the_newest_moves_on(cached, model, tmp_path, new_policy):
    cached("tiny/church", model)
    policies.save(new_policy(seed=4), tmp_path / "retrained")
    cached("tiny/church", tmp_path / "retrained", LATER)
    assert loads_as(new_policy(seed=3), f"tiny/church@{COMMIT}")
    assert loads_as(new_policy(seed=4), "tiny/church")


def test_cold_cache_says_what_to_do(cache):
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set and the cache.*Start once"):
        policies.load("google/ddpm-church-256")
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set"):
        policies.load(f"google/ddpm-church-256@{COMMIT}")


def test_half_a_download_in_the_cache_says_what_to_do(cached, model):
    snapshot = cached("tiny/church", model, listed=True)
    (snapshot / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set.*1 file.*missing"):
        policies.load("tiny/church")


def test_age_classifier_from_the_cache(cached, tmp_path):
    """Its preprocessor_config.json is of 2021, with a number for a size."""
    folder = shutil.copytree(TOY / "age", tmp_path / "age")
    old = {"feature_extractor_type": "ViTFeatureExtractor", "size": 64, "resample": 2}
    old |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(old | {"do_resize": True}))
    cached("nateraw/vit-age-classifier", folder)
    ours = encoders.load_age_classifier("nateraw/vit-age-classifier")
    toy = encoders.load_age_classifier(TOY / "age")
    assert (ours.image_size, ours.mean, ours.std) == (64, (0.5,) * 3, (0.5,) * 3)
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert encoders.age_logits(ours, pictures).equal(encoders.age_logits(toy, pictures))


def test_published_head_from_the_cache(cached, tmp_path, monkeypatch):
    head = encoders.AestheticHead(12).eval()
    (tmp_path / "laion").mkdir()
    file = tmp_path / "laion" / hub.LAION_HEAD
    torch.save(head.state_dict(), file)
    cached("somebody/predictor", tmp_path / "laion")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(encoders, "LAION_HEAD_SHA256", digest)
    x = torch.ones(2, 12)
    assert encoders.load_aesthetic_head("somebody/predictor")(x).equal(head(x))


def test_clip_from_the_cache(cached, tmp_path, monkeypatch):
    """With its own mean and activation, which open_clip knows by the name and not by the file."""
    layers = {"layers": 1, "width": 16}
    sizes = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "head_width": 8, **layers},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "heads": 2, **layers},
    }
    (tmp_path / "ViT-tiny.json").write_text(json.dumps(sizes))
    open_clip.add_model_config(tmp_path / "ViT-tiny.json")
    recipe = {"hf_hub": "tiny/clip/", "quick_gelu": True, "mean": (0.1,) * 3, "std": (0.9,) * 3}
    recipe |= {"url": "", "interpolation": "bicubic", "resize_mode": "shortest"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-tiny", {"own": recipe})
    original = open_clip.create_model("ViT-tiny", force_quick_gelu=True).eval()
    (tmp_path / "clip").mkdir()
    save_file(original.state_dict(), tmp_path / "clip" / "open_clip_model.safetensors")
    cached("tiny/clip", tmp_path / "clip")

    for revision in ("", f"@{COMMIT}"):
        clip = encoders.load_clip("ViT-tiny:own" + revision, "cpu")
        assert (clip.image_size, clip.mean, clip.std) == (16, (0.1,) * 3, (0.9,) * 3)
        x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert clip.model.encode_image(x).equal(original.encode_image(x))
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set"):
        encoders.load_clip("ViT-L-14:openai")


@pytest.mark.parametrize("reward", ["aesthetic", "over50"])
def test_reward_without_its_model_says_what_to_do(reward):
    models = {
        "clip": "ViT-L-14:openai",
        "aesthetic": "no/head",
        "age": "nateraw/vit-age-classifier",
    }
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set"):
        rewards.load(reward, models)


# ------------------------------------------------------------------------------- a Hub


class Hub(http.server.ThreadingHTTPServer):
    """Answers as the real one does to what the loaders ask: what there is, a list, the files."""

    def __init__(self):
        self.repositories = {}  # id → folder
        self.gated = set()
        self.broken = set()  # file names whose transfers end half-way
        self.asked = []
        super().__init__(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        hub.asked.append(self.path)
        api = self.path.startswith("/api/models/")
        parts = self.path.partition("?")[0].removeprefix("/api/models").strip("/").split("/")
        repository = "/".join(parts[:2])
        revision = parts[3] if len(parts) > 3 else "main"
        if repository not in hub.repositories:
            return self.refuse(404, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        folder = hub.repositories[repository]
        names = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
        if not api:
            return self.file(repository, folder, "/".join(parts[4:]))
        if len(parts) > 2 and parts[2] == "tree":
            files = [{"type": "file", "path": n, "oid": "0", "size": self.size(folder, n)}
                     for n in names]  # fmt: skip
            return self.send(200, json.dumps(files).encode())
        siblings = [{"rfilename": name} for name in names]
        content = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
        self.send(200, json.dumps(content).encode())

    def file(self, repository, folder, name):
        if repository in self.server.gated:
            return self.refuse(403, "GatedRepo")
        if not (folder / name).is_file():
            return self.refuse(404, "EntryNotFound")
        content = (folder / name).read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        whole = name not in self.server.broken
        self.send(200, content, ETag=f'"{etag}"', whole=whole)

    def size(self, folder, name):
        return (folder / name).stat().st_size

    def refuse(self, status, code):
        self.send(status, b"", **{"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status, content, whole=True, **headers):
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content if whole else content[: len(content) // 2])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def online(monkeypatch, model):
    """A Hub that has tiny/church; the loaders ask it and no other."""
    server = Hub()
    server.repositories["tiny/church"] = model
    threading.Thread(target=server.serve_forever, daemon=True).start()
    reach(monkeypatch, server.address)
    yield server
    server.shutdown()
    server.server_close()


def reach(monkeypatch, address):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hf_api.api, "endpoint", address)


def test_download_fills_the_cache_once(online, new_policy, monkeypatch):
    assert loads_as(new_policy(seed=3), "tiny/church")
    fetched = [path for path in online.asked if "/resolve/" in path]
    assert any(path.endswith("diffusion_pytorch_model.bin") for path in fetched)
    assert not any("images" in path for path in fetched)
    online.asked.clear()
    assert loads_as(new_policy(seed=3), "tiny/church")
    assert not any("/resolve/" in path for path in online.asked)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.commit.cache_clear()
    online.asked.clear()
    assert loads_as(new_policy(seed=3), "tiny/church")
    assert online.asked == []


@pytest.mark.parametrize(
    "source, message",
    [
        ("tiny/chruch", "there is no tiny/chruch, or it is private. Check the spelling"),
        ("tiny/church@v9", "tiny/church has no revision 'v9'. Take a commit"),
        ("tiny/church@5a1118b", "has no revision '5a1118b'.*all 40 digits"),
        ("tiny/gated", "gives access on request.*/tiny/gated, then log in.*hf auth login"),
    ],
)
def test_wrong_or_gated_id_says_what_to_do(online, model, source, message):
    online.repositories["tiny/gated"] = model
    online.gated.add("tiny/gated")
    with pytest.raises(FileNotFoundError, match=f"(?s)'{source}'.*{message}"):
        policies.load(source)


def test_interrupted_download_says_what_to_do_and_then_ends(online, new_policy, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between attempts
    online.broken.add("diffusion_pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match="the download broke off. Check.*what is down.*stay"
    ):
        policies.load("tiny/church")
    online.broken.clear()
    assert loads_as(new_policy(seed=3), "tiny/church")


@pytest.mark.parametrize("revision", ["", f"@{COMMIT}"])
def test_unreachable_hub_says_what_to_do_at_once(monkeypatch, revision):
    reach(monkeypatch, "http://127.0.0.1:9")
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(FileNotFoundError, match="the Hub cannot be reached.*Check the connection"):
        policies.load("google/ddpm-church-256" + revision)
    with pytest.raises(FileNotFoundError, match="the Hub cannot be reached"):
        encoders.load_age_classifier("nateraw/vit-age-classifier" + revision)
    assert sum(pauses) < 60


@pytest.mark.parametrize(
    "problem, message",
    [
        (errno.ENOSPC, "the disk of its cache, .*cache, is full. Free some space, or set HF_HOME"),
        (errno.EDQUOT, "is full"),
        (errno.EACCES, "cannot be written. Set HF_HOME"),
        (errno.EROFS, "cannot be written. Set HF_HOME"),
    ],
)
def test_full_or_unwritable_cache_says_what_to_do(online, monkeypatch, problem, message):
    def fail(*_, **__):
        raise OSError(problem, "no")

    monkeypatch.setattr(file_download, "http_get", fail)
    with pytest.raises(FileNotFoundError, match=message):
        policies.load("tiny/church")


def test_too_many_requests_say_what_to_do():
    error = OSError("slow down")
    error.response = SimpleNamespace(status_code=429)
    said = pytest.raises(FileNotFoundError, match="too many requests from here. Wait some minutes")
    with said, hub.explained("google/ddpm-church-256"):
        raise error


def test_silent_server_is_not_waited_for_without_end(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.5)
        began = time.monotonic()
        with pytest.raises(FileNotFoundError, match="the Hub cannot be reached"):
            hub.commit("nobody/answers")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("offline, advice", [(True, "Start without it"), (False, "try again")])
def test_what_cannot_be_sent_is_not_a_matter_of_the_cache(monkeypatch, offline, advice):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    said = pytest.raises(FileNotFoundError, match=f"cannot send to 'me/it'.*{advice}")
    with said as caught, hub.explained("me/it", "send to"):
        raise ConnectionError("offline")
    assert "cache" not in str(caught.value)


def test_repository_without_the_files_says_so(online):
    with pytest.raises(FileNotFoundError, match="/tiny/church lacks a file"):
        encoders.load_age_classifier("tiny/church")
