import contextlib
import hashlib
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.bundle.manifest import Bundle, Manifest, OutputSpec, load_bundle, save_bundle
from helpers.bundle.runtime import batch_size
from helpers.errors import BundleError, UserError
from helpers.images.spec import InputSpec
from helpers.pipeline.stages import output_schema
from helpers.storage import open_storage
from helpers.tasks import parameters_for

MANIFEST = Manifest(
    name="net-fp32",
    architecture="net",
    task="classification",
    input=InputSpec(height=20, width=30, color="rgb", mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0), resize="crop"),
    outputs=(OutputSpec("logits", (3,)), OutputSpec("grid", (2, 4, 4))),
    labels=("a", "b", "größer"),
    postprocess={"top_k": 2, "threshold": 0.5},
    precision="fp32",
    arithmetic="f32",
    flops=1000,
    checkpoint={"file": "net.pt", "sha256": "0" * 64},
)
FILES = {"model.xml": b"<net/>", "model.bin": bytes(range(256))}


@pytest.fixture
def storage(tmp_path):
    storage = open_storage(str(tmp_path / "bundle"))
    save_bundle(storage, MANIFEST, FILES)
    return storage


@pytest.fixture
def manifest_file(storage) -> Path:
    return Path(storage.join("manifest.json"))


def change(manifest_file: Path, **entries) -> None:
    manifest_file.write_text(json.dumps({**json.loads(manifest_file.read_text()), **entries}))


def test_a_bundle_comes_back_as_it_was_saved(storage):
    bundle = load_bundle(storage)
    assert replace(bundle.manifest, files={}) == MANIFEST
    assert bundle.manifest.files == {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    assert {name: bundle.read(name) for name in FILES} == FILES
    assert bundle.manifest.input.shape == (20, 30, 3) and bundle.manifest.input.nbytes == 1800


def test_a_loaded_bundle_has_the_name_of_the_saved_one(storage):
    assert load_bundle(storage).manifest.model == save_bundle(storage, MANIFEST, FILES).manifest.model


def test_a_bundle_can_be_copied_elsewhere(storage, tmp_path):
    shutil.copytree(storage.root, tmp_path / "copy")
    copy = load_bundle(open_storage(str(tmp_path / "copy")))
    assert copy.manifest == load_bundle(storage).manifest and copy.read("model.bin") == FILES["model.bin"]


def test_the_digest_changes_with_weights_graph_and_settings(tmp_path):
    def digest(manifest=MANIFEST, **files):
        storage = open_storage(str(tmp_path / "other"))
        content = {**FILES, **{f"model.{suffix}": value for suffix, value in files.items()}}
        return save_bundle(storage, manifest, content).manifest.digest

    digests = [
        digest(),
        digest(bin=b"\x01" + FILES["model.bin"][1:]),
        digest(xml=b"<net />"),
        digest(replace(MANIFEST, labels=("a", "b", "c"))),
        digest(replace(MANIFEST, postprocess={"top_k": 3, "threshold": 0.5})),
        digest(replace(MANIFEST, input=replace(MANIFEST.input, resize="stretch"))),
    ]
    assert len(set(digests)) == len(digests)
    assert digest() == digests[0]


def test_a_folder_without_a_manifest_is_named_with_the_command_that_makes_one(tmp_path):
    with pytest.raises(BundleError) as error:
        load_bundle(open_storage(str(tmp_path / "nothing here")))
    for part in (str(tmp_path / "nothing here"), "manifest.json", "python -m helpers export"):
        assert part in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"not json", b"\xff\xfe\x00", b"<html>"])
def test_a_manifest_that_is_not_json_is_named(storage, manifest_file, content):
    manifest_file.write_bytes(content)
    with pytest.raises(BundleError, match="manifest.json is not valid JSON.*export the bundle again"):
        load_bundle(storage)


@pytest.mark.parametrize("content", ["[]", "1", '"text"', "null", "{}"])
def test_json_that_is_no_manifest_is_named(storage, manifest_file, content):
    manifest_file.write_text(content)
    with pytest.raises(BundleError, match="manifest.json.*export the bundle again"):
        load_bundle(storage)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_is_refused(storage, manifest_file, version):
    change(manifest_file, format=version)
    with pytest.raises(BundleError, match="manifest.json has not format 1.*export the bundle again"):
        load_bundle(storage)


@pytest.mark.parametrize("entry", ["author", "anchors"])
def test_an_unknown_entry_is_named(storage, manifest_file, entry):
    change(manifest_file, **{entry: "x"})
    with pytest.raises(BundleError, match=f"manifest.json.*{entry}.*export the bundle again"):
        load_bundle(storage)


@pytest.mark.parametrize("entry", ["task", "input", "outputs", "labels", "postprocess", "precision"])
def test_a_missing_entry_is_named(storage, manifest_file, entry):
    values = json.loads(manifest_file.read_text())
    del values[entry]
    manifest_file.write_text(json.dumps(values))
    with pytest.raises(BundleError, match=f"manifest.json.*{entry}.*export the bundle again"):
        load_bundle(storage)


WRONG_ENTRIES = [
    {"input": None},
    {"input": []},
    {"input": "28x28"},
    {"outputs": None},
    {"outputs": ["logits"]},
    {"outputs": {"name": "logits"}},
    {"labels": None},
    {"files": None},
    {"postprocess": None},
]


@pytest.mark.parametrize("entries", WRONG_ENTRIES, ids=str)
def test_an_entry_of_the_wrong_type_names_the_manifest(storage, manifest_file, entries):
    change(manifest_file, **entries)
    with pytest.raises(BundleError, match="manifest.json"):
        load_bundle(storage)


WRONG_INPUTS = [
    {"color": "cmyk"},
    {"resize": "warp"},
    {"mean": [1.0]},
    {"std": []},
    {"mean": 1.0},
    {"std": None},
    {"depth": 3},
]


@pytest.mark.parametrize("values", WRONG_INPUTS, ids=str)
def test_a_wrong_input_names_the_manifest_and_the_setting(storage, manifest_file, values):
    change(manifest_file, input={**json.loads(manifest_file.read_text())["input"], **values})
    with pytest.raises(BundleError) as error:
        load_bundle(storage)
    assert "manifest.json" in str(error.value) and next(iter(values)) in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-1], lambda content: b"", lambda content: content[:-1] + b"\x00"],
    ids=["truncated", "empty", "one byte changed"],
)
@pytest.mark.parametrize("name", list(FILES))
def test_a_damaged_file_is_named_with_the_remedy(storage, name, damage):
    storage.write(name, damage(FILES[name]))
    with pytest.raises(BundleError, match=f"{name} is damaged.*copy or export the bundle again"):
        load_bundle(storage).read(name)


@pytest.mark.parametrize("name", list(FILES))
def test_a_missing_file_is_named_with_the_remedy(storage, name):
    storage.delete(name)
    with pytest.raises(BundleError, match=f"{name} cannot be read.*copy the bundle again"):
        load_bundle(storage).read(name)


NAMES = ["../x.npy", "/etc/passwd", "a/b.npy", "..", ".", "", "a\\b.npy", "nul\0.npy", "manifest.json"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_not_in_the_bundles_own_folder_is_refused_and_not_looked_at(storage, manifest_file, name):
    (manifest_file.parent.parent / "x.npy").write_bytes(b"secret")
    change(manifest_file, files={name: hashlib.sha256(b"secret").hexdigest()})
    with pytest.raises(BundleError, match="no file of the bundle's own folder") as error:
        load_bundle(storage)
    assert "6" not in str(error.value).partition("files names")[2]  # bytes of the file elsewhere


LIES = {
    "nested without end": lambda text: "[" * 200_000,
    "nested within": lambda text: text.replace('"top_k": 2', '"top_k": ' + "[" * 500 + "]" * 500),
    "flops beyond all numbers": lambda text: text.replace('"flops": 1000', '"flops": 1e400'),
    "flops of 5,000 digits": lambda text: text.replace('"flops": 1000', f'"flops": {"9" * 5000}'),
    "flops of 100 digits": lambda text: text.replace('"flops": 1000', f'"flops": {"9" * 100}'),
    "negative flops": lambda text: text.replace('"flops": 1000', '"flops": -1'),
    "flops true": lambda text: text.replace('"flops": 1000', '"flops": true'),
    "not a number": lambda text: text.replace("4.0", "NaN"),
    "infinite": lambda text: text.replace("0.5", "-Infinity"),
    "std of zero": lambda text: text.replace("4.0", "0"),
    "a side of zero": lambda text: text.replace('"height": 20', '"height": 0'),
    "a side that no memory holds": lambda text: text.replace('"height": 20', '"height": 1000000000'),
    "an output that no memory holds": lambda text: text.replace(
        '"shape": [\n        3', '"shape": [\n        3000000000'
    ),
    "an output of many dimensions": lambda text: text.replace(
        '"shape": [\n        3', '"shape": [' + "9," * 10**6 + "3"
    ),
    "a name of no characters of any file": lambda text: text.replace("net-fp32", "\\ud800"),
    "a key of none": lambda text: text.replace("threshold", "\\ud800"),
    "labels that are numbers": lambda text: text.replace('"a"', "1"),
    "two outputs of one name": lambda text: text.replace('"grid"', '"logits"'),
    "unknown arithmetic": lambda text: text.replace('"f32"', '"f64"'),
    "an enormous manifest": lambda text: text + " " * 17 * 2**20,
    "bytes that are no text": lambda text: text.replace("größer", "\udcff"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_cannot_be_is_one_sentence(storage, manifest_file, lie):
    text = json.dumps(json.loads(manifest_file.read_text()), indent=2, ensure_ascii=False)
    changed = LIES[lie](text)
    assert changed != text
    manifest_file.write_bytes(changed.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleError, match=r"manifest\.json.*export the bundle again") as error:
        load_bundle(storage)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    str(error.value).encode()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -1, 1e300]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
GOOD = json.loads(replace(MANIFEST, files={"model.xml": "0" * 64}).to_json())


def places(value, path=()):
    """Where a value of JSON has other values."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def mutated(value, path, mutation):
    if not path:
        return mutation
    copy = value.copy()
    if mutation == "(removed)" and len(path) == 1:
        copy.pop(path[0])
    else:
        copy[path[0]] = mutated(value[path[0]], path[1:], mutation)
    return copy


MUTATIONS = st.lists(st.tuples(st.sampled_from(places(GOOD)), JSON | st.just("(removed)")), min_size=1, max_size=3)


@given(MUTATIONS)
@settings(max_examples=1000, deadline=None)
def test_any_manifest_is_a_bundle_that_can_be_used_or_a_bundle_error(mutations):
    values = GOOD
    for path, mutation in mutations:
        with contextlib.suppress(
            LookupError, TypeError, AttributeError
        ):  # an earlier mutation has taken the place away
            values = mutated(values, path, mutation)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "manifest.json").write_bytes(json.dumps(values).encode())
        use(folder)


@given(JSON | st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_anything_in_a_manifests_place_is_a_bundle_error(content):
    with tempfile.TemporaryDirectory() as folder:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        Path(folder, "manifest.json").write_bytes(data)
        with pytest.raises(BundleError):
            load_bundle(open_storage(folder))


def use(folder: str) -> None:
    """All that a run does with a manifest before it reads the graph."""
    try:
        manifest = load_bundle(open_storage(folder)).manifest
    except BundleError as error:
        assert "\n" not in str(error)
        return
    assert json.loads(manifest.to_json())["name"] == manifest.name and len(manifest.digest) == 12
    assert manifest.input.nbytes > 0 and 1 <= batch_size(Bundle(open_storage(folder), manifest), 1, 64) <= 64
    assert len(output_schema(manifest)) == 6 + len(manifest.outputs)
    with contextlib.suppress(UserError):
        parameters_for(manifest, {})


def test_a_bundle_whose_writing_is_cut_off_has_no_manifest(tmp_path):
    class FullStorage(type(open_storage(str(tmp_path)))):
        def write(self, path, data):
            if path == "model.bin":
                raise OSError("disk full")
            super().write(path, data)

    storage = FullStorage(str(tmp_path))
    with pytest.raises(OSError, match="disk full"):
        save_bundle(storage, MANIFEST, FILES)
    with pytest.raises(BundleError, match="no model bundle"):
        load_bundle(storage)


def test_a_bundle_that_is_being_written_again_is_not_taken_for_whole(bundle_uri, tmp_path, monkeypatch):
    copy = open_storage(str(shutil.copytree(bundle_uri, tmp_path / "copy")))
    manifest, write = load_bundle(copy).manifest, type(copy).write

    def fail_at_weights(self, path, data):
        if path == "model.bin":
            raise OSError(5, "the machine stopped here")
        write(self, path, data)

    monkeypatch.setattr(type(copy), "write", fail_at_weights)
    with pytest.raises(OSError, match="stopped here"):
        save_bundle(copy, manifest, {"model.xml": b"new", "model.bin": b"new"})
    with pytest.raises(BundleError, match="no model bundle"):
        load_bundle(copy)
