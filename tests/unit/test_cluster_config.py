"""cluster.yaml: every field wrong once, in one line that says where and what."""

from pathlib import Path
from typing import Any

import pytest

from outrider.cluster.cluster_config import ClusterConfig, load_config, parse_config
from outrider.cluster.workers_config import WorkersConfig
from outrider.models.demo import pair
from outrider.speculation.errors import InvalidConfigError

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"nam": "x"}, "nam: unknown key; did you mean 'name'?"),
    ({"name": "Two Words"}, "name must be lower-case letters, digits and hyphens, not 'Two Words'"),
    ({"address": "1:2:3"}, "address must be local, auto or host:port, not '1:2:3'"),
    ({"target": None}, "target should be a valid dictionary"),
    ({"target": {"replcas": 2}}, "target.replcas: unknown key; did you mean 'replicas'?"),
    ({"target": {"model": 7}}, "target.model should be a valid string, not 7"),
    ({"target": {"tensor_parallel_size": 0}}, "target.tensor_parallel_size should be greater"),
    ({"target": {"replicas": -1}}, "target.replicas should be greater than or equal to 1, not -1"),
    ({"target": {"dtype": "int4"}}, "target.dtype should be 'auto', 'bfloat16', 'float32' or 'float64'"),
    ({"target": {"numerics": "x"}}, "target.numerics should be 'canonical' or 'fast', not 'x'"),
    ({"target": {"max_model_len": 0}}, "target.max_model_len should be greater"),
    (
        {"target": {"kv_cache_memory": "much"}},
        "target.kv_cache_memory must be bytes or a size such as 4GiB, not 'much'",
    ),
    ({"target": {"max_num_batched_tokens": 0}}, "target.max_num_batched_tokens should be greater"),
    (
        {"target": {"max_num_batched_tokens": 65}},
        "target: max_num_batched_tokens above 64 needs a GPU and numerics 'fast', not 65",
    ),
    (
        {"target": {"max_num_batched_tokens": 65, "num_gpus": 1, "numerics": "canonical"}},
        "target: max_num_batched_tokens above 64 needs a GPU and numerics 'fast', not 65",
    ),
    ({"target": {"device": "tpu"}}, "target.device should be 'auto', 'cpu' or 'cuda', not 'tpu'"),
    ({"target": {"device": "cuda"}}, "target: device 'cuda' needs num_gpus above 0"),
    ({"draft": {"device": "cuda"}}, "draft[0]: device 'cuda' needs num_gpus above 0"),
    (
        {"target": {"num_gpus": 0.5, "tensor_parallel_size": 2}},
        "target: tensor_parallel_size 2 needs num_gpus 1 at least, for each rank takes a whole one, not 0.5",
    ),
    (
        {"draft": {"num_gpus": 1, "tensor_parallel_size": 2}},
        "draft[0]: tensor_parallel_size 2 needs num_gpus 2 at least, for each rank takes a whole one, not 1",
    ),
    (
        {"draft": {"num_gpus": 1, "device": "cuda", "quantization": "int8"}},
        "draft[0]: quantization 'int8' is for CPUs, not for device 'cuda'",
    ),
    ({"target": {"gpu_memory_utilization": 1.5}}, "target.gpu_memory_utilization should be less than"),
    ({"target": {"enable_prefix_caching": "x"}}, "target.enable_prefix_caching should be a valid boolean"),
    ({"target": {"target_profile": 7}}, "target.target_profile should be a valid string, not 7"),
    ({"target": {"max_num_seqs": 65}}, "target.max_num_seqs should be less than or equal to 64, not 65"),
    ({"target": {"num_cpus": "2"}}, "target.num_cpus should be a valid number, not '2'"),
    ({"target": {"num_gpus": -1}}, "target.num_gpus should be greater"),
    ({"target": {"resources": {"a": "b"}}}, "target.resources.a should be a valid number, not 'b'"),
    ({"target": {"labels": {"tier": 1}}}, "target.labels.tier should be a valid string, not 1"),
    ({"target": {"accelerator_type": 1}}, "target.accelerator_type should be a valid string"),
    ({"target": {"threads": 0}}, "target.threads should be greater"),
    (
        {"target": {"quantization": "int8"}},
        "target.quantization must be a draft pool's, not 'int8': the target's",
    ),
    ({"draft": {"quantization": "fp8"}}, "draft[0].quantization should be 'int8', not 'fp8'"),
    (
        {"draft": {"method": "ngram", "quantization": "int8"}},
        "draft[0]: method 'ngram' has no weights, so quantization 'int8' must go",
    ),
    (
        {"draft": {}, "speculation": {"quantization": "int8"}},
        "speculation: quantization belongs to a draft pool",
    ),
    ({"draft": 5}, "draft should be a valid list, not 5"),
    ({"draft": {"nme": "x"}}, "draft[0].nme: unknown key; did you mean 'name'?"),
    ({"draft": {"name": "UP"}}, "draft[0].name must be lower-case"),
    ({"draft": {"method": "eagle"}}, "draft[0].method should be 'draft_model' or 'ngram', not 'eagle'"),
    ({"draft": {"method": "ngram", "model": "m"}}, "draft[0]: method 'ngram' takes no model, not 'm'"),
    ({"draft": {"max_sessions": 0}}, "draft[0].max_sessions should be greater"),
    ({"draft": [{}, {}]}, "two draft pools are called 'draft'; give each a name"),
    ({"draft": {"name": "target"}}, "a draft pool must not be called 'target'"),
    ({"draft": [{"method": "ngram"}, {"name": "b"}]}, "draft pools beside one of method 'ngram'"),
    ({"target": {"model": "./m"}, "draft": {}}, "draft pool 'draft' needs a model that fits the target's"),
    ({"speculation": {"pipeline": "serial"}}, "speculation is set, but no draft pool drafts"),
    ({"draft": {}, "speculation": {"pipelin": "x"}}, "speculation: unknown key 'pipelin'; did you mean"),
    ({"draft": {}, "speculation": {"pipeline": "x"}}, "speculation: pipeline must be one of"),
    ({"draft": {}, "speculation": {"model": "m"}}, "speculation: model belongs to a draft pool"),
    ({"draft": {}, "speculation": {"workers": 2}}, "speculation: workers may say per_request"),
    ({"draft": {}, "speculation": {"workers": {"count": 2}}}, "speculation: workers may say per_request"),
    (
        {"draft": {}, "speculation": {"workers": {"per_request": 9}}},
        "speculation.workers: per_request must be at most 8, not 9",
    ),
    ({"limits": {"start_seconds": 0}}, "limits.start_seconds should be greater than 0, not 0"),
    ({"limits": {"max_tokens": 0}}, "limits.max_tokens should be greater"),
    ({"limits": {"max_choices": 0}}, "limits.max_choices should be greater"),
    ({"security": {"tls_key": "k"}}, "security: tls_certificate and tls_key must be given together"),
    ({"security": {"token": "t"}}, "security.token: unknown key; did you mean 'token_file'?"),
    ({"network": {"interface": "a/b"}}, "network.interface must be the name of a network interface"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_wrong_is_said_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        parse_config(values, "c.yaml")
    assert str(caught.value).startswith(f"c.yaml: {message}")
    assert "\n" not in str(caught.value)


def test_every_field_of_a_section_is_wrong_once() -> None:
    config = ClusterConfig()
    said = " ".join(message for _, message in WRONG)
    for section in ("target", "limits", "network"):
        for name in type(getattr(config, section)).model_fields:
            assert f"{section}.{name}" in said


def test_an_empty_file_is_a_plain_target(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("")
    config = load_config(path)
    assert config.target.model == str(pair.TARGET)
    assert config.speculative_config([]) is None


def test_one_pool_needs_no_list() -> None:
    config = parse_config({"draft": {"replicas": 2}}, "x")
    assert [pool.replicas for pool in config.worker_pools] == [2]
    given = config.speculative_config(["h:1"])
    assert given is not None
    assert given["workers"]["addresses"] == ["h:1"]


def test_several_workers_may_draft_for_a_request() -> None:
    values = {"draft": {"replicas": 3}, "speculation": {"workers": {"per_request": 2}}}
    for addresses in ([], ["h:1", "h:2", "h:3"]):
        given = parse_config(values, "x").speculative_config(addresses)
        assert given is not None
        workers = WorkersConfig.parse(given["workers"])
        assert (workers.per_request, list(workers.addresses)) == (2, addresses)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target: [", "is no YAML in line 1"),
        ("name: a\nname: b\n", "is no YAML in line 2: key 'name' is given twice"),
        ("1: a\n", "is no YAML in line 1: key 1 is no text"),
        ("- a\n", "must hold keys such as 'target:'"),
    ],
)
def test_text_that_is_no_cluster(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InvalidConfigError, match=message):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match=r"none\.yaml cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidConfigError, match="it is not UTF-8 text"):
        load_config(path)


@pytest.mark.parametrize(
    ("section", "device"),
    [
        ({}, "cpu"),
        ({"num_gpus": 1}, "auto"),
        ({"num_gpus": 0.5, "device": "cuda"}, "cuda"),
        ({"num_gpus": 1, "device": "cpu"}, "cpu"),
    ],
)
def test_a_process_without_a_gpu_of_its_own_uses_none(section: dict[str, Any], device: str) -> None:
    config = parse_config({"target": section, "draft": section}, "cluster.yaml")
    assert config.target.engine_settings["device"] == config.draft[0].own_device == device
