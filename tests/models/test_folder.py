"""The model folder: references, versions, aliases, and errors that list what exists."""

import hashlib
import json
import os

import pytest

from penstock.models.folder import ModelError, aliases, models, resolve, set_alias, versions


@pytest.fixture
def root(tmp_path):
    for name, version, file in [
        ("fraud", "1", "model.onnx"),
        ("fraud", "2", "model.txt"),
        ("fraud", "10", "model.json"),
        ("spend-limit", "1.2", "model.ubj"),
        ("spend-limit", "1.10", "model.ubj"),
    ]:
        folder = tmp_path / name / version
        folder.mkdir(parents=True)
        (folder / file).write_bytes(f"{name} {version}".encode())
    (tmp_path / "fraud" / "aliases.json").write_text(json.dumps({"champion": "2", "next": 10}))
    (tmp_path / "fraud" / "notes").mkdir()
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_resolve(root):
    found = resolve(root, "fraud@1")
    assert (found.name, found.version, found.ref) == ("fraud", "1", "fraud@1")
    assert found.path == root / "fraud" / "1" / "model.onnx"
    assert found.sha256 == hashlib.sha256(b"fraud 1").hexdigest()
    assert resolve(root, "fraud@champion").version == "2"
    assert resolve(str(root), "fraud@next").path.name == "model.json"
    assert resolve(root, "spend-limit@1.10").version == "1.10"


def test_versions_are_ordered_as_numbers(root):
    assert versions(root, "fraud") == ["1", "2", "10"]
    assert versions(root, "spend-limit") == ["1.2", "1.10"]
    assert models(root) == ["fraud", "spend-limit"]
    assert models(root / "nowhere") == []
    assert versions(root, "../fraud") == []


@pytest.mark.parametrize(
    ("ref", "text"),
    [
        ("fraud@3", r"model 'fraud@3' is not in .*: fraud has versions 1, 2, 10; aliases champion \(2\), next \(10\)"),
        ("fraud@best", "fraud has versions 1, 2, 10"),
        ("froud@1", "models there are fraud, spend-limit"),
        ("empty@1", "models there are fraud, spend-limit"),
        ("fraud", "expected name@version or name@alias; fraud has versions"),
        ("fraud@", "expected name@version"),
        ("@1", "expected name@version"),
        ("../fraud@1", "names are letters"),
        ("fraud@../1", "names are letters"),
        ("fraud@1@2", "names are letters"),
        ("fraud@.", "names are letters"),
    ],
)
def test_errors_list_what_exists(root, ref, text):
    with pytest.raises(ModelError, match=text):
        resolve(root, ref)


def test_an_empty_folder(tmp_path):
    with pytest.raises(ModelError, match="it holds no models"):
        resolve(tmp_path, "fraud@1")
    with pytest.raises(ModelError, match="it holds no models"):
        resolve(tmp_path / "none", "fraud@1")


def test_a_version_holds_one_model_file(root):
    (root / "fraud" / "1" / "model.txt").write_text("")
    with pytest.raises(ModelError, match=r"expected one of model.onnx, .* found model\.onnx, model\.txt"):
        resolve(root, "fraud@1")
    for path in (root / "fraud" / "1").iterdir():
        path.unlink()
    with pytest.raises(ModelError, match="found nothing"):
        resolve(root, "fraud@1")


def test_what_is_no_file_is_no_model(root):
    """A pipe is not opened: that would wait for whoever writes into it."""
    path = root / "fraud" / "1" / "model.onnx"
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("gone", path)):
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        with pytest.raises(ModelError, match=r"expected one of .* found model\.onnx \(no file\)"):
            resolve(root, "fraud@1")


def test_aliases(root):
    assert aliases(root, "fraud") == {"champion": "2", "next": "10"}
    assert aliases(root, "spend-limit") == {}
    set_alias(root, "fraud", "champion", "10")
    assert resolve(root, "fraud@champion").version == "10"
    set_alias(root, "spend-limit", "live", "1.2")
    assert resolve(root, "spend-limit@live").version == "1.2"
    with pytest.raises(ModelError, match="has no version '3'; fraud has versions"):
        set_alias(root, "fraud", "champion", "3")
    with pytest.raises(ModelError, match="no name for an alias"):
        set_alias(root, "fraud", "7", "1")


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1.5}', '{"a": true}', '{"3": "1"}', '{"": "1"}'])
def test_a_damaged_alias_file_is_named(root, text):
    (root / "fraud" / "aliases.json").write_text(text)
    with pytest.raises(ModelError, match=r"aliases\.json"):
        resolve(root, "fraud@champion")
    assert resolve(root, "fraud@1").version == "1"


def test_an_alias_to_a_version_that_is_gone(root):
    (root / "fraud" / "aliases.json").write_text('{"champion": "7"}')
    with pytest.raises(ModelError, match="alias champion means version 7, but fraud has versions 1, 2, 10"):
        resolve(root, "fraud@champion")
