"""``build_openai_app``'s arguments: an ``LLMConfig`` becomes a cluster; what has no counterpart is named."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.cluster.serve_config import LLMConfig, OpenAIAppConfig, cluster_of
from outrider.speculation.errors import ClusterError, InvalidConfigError

LOADING = {"model_id": "My/Model-7B", "model_source": "./target"}
FULL: dict[str, Any] = {
    "model_loading_config": LOADING,
    "accelerator_type": "H100",
    "deployment_config": {"num_replicas": 3},
    "placement_group_config": {"bundles": [{"CPU": 2, "GPU": 1, "disk": 4}] * 2, "strategy": "PACK"},
    "engine_kwargs": {
        "tensor_parallel_size": 2,
        "device": "cpu",
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "speculative_config": {
            "method": "draft_model",
            "model": "./draft",
            "workers": 2,
            "max_model_len": 512,
            "num_speculative_tokens": 5,
        },
    },
}


def test_a_whole_llm_config_is_a_cluster() -> None:
    cluster = cluster_of(LLMConfig.model_validate(FULL))
    target, (draft,) = cluster.target, cluster.draft
    assert (cluster.name, cluster.address) == ("my-model-7b", "auto")
    assert (target.model, target.replicas, target.accelerator_type) == ("./target", 3, "H100")
    assert (target.tensor_parallel_size, target.max_model_len, target.max_num_seqs) == (2, 1024, 16)
    assert (target.num_cpus, target.num_gpus, target.resources) == (2, 1, {"disk": 4})
    assert (draft.model, draft.replicas, draft.max_model_len) == ("./draft", 2, 512)
    assert cluster.speculation["num_speculative_tokens"] == 5


def test_what_is_left_out() -> None:
    cluster = cluster_of(LLMConfig.model_validate({"model_loading_config": {"model_id": "org/small"}}))
    assert cluster.target.model == "org/small"
    assert cluster.target.replicas == 1
    assert list(cluster.draft) == []


@pytest.mark.parametrize(
    "given", [{"method": "ngram", "prompt_lookup_max": 4}, {"prompt_lookup_max": 4}], ids=str
)
def test_ngrams_need_no_workers(given: dict[str, Any]) -> None:
    config = {"model_loading_config": LOADING, "engine_kwargs": {"speculative_config": given}}
    (draft,) = cluster_of(LLMConfig.model_validate(config)).draft
    assert (draft.method, draft.model) == ("ngram", None)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "llm_configs or clusters must name at least one model"),
    ({"llm_confgs": []}, "unknown key 'llm_confgs'; did you mean 'llm_configs'?"),
    ({"llm_configs": [{"model_loading_confg": LOADING}]}, "did you mean 'model_loading_config'?"),
    ({"llm_configs": [{}]}, "llm_configs.0.model_loading_config Field required"),
    ({"llm_configs": [{"model_loading_config": {"model_id": ""}}]}, "model_id"),
    ({"llm_configs": [{"model_loading_config": {"modelid": "a"}}]}, "did you mean 'model_id'?"),
    ({"llm_configs": [{"model_loading_config": LOADING, "deployment_config": {"num_replicas": 0}}]}, "not 0"),
    (
        {"llm_configs": [{"model_loading_config": LOADING, "deployment_config": {"num_replica": 1}}]},
        "did you mean 'num_replicas'?",
    ),
    ({"llm_configs": "a"}, "llm_configs should be a valid list"),
    ({"clusters": [1]}, "clusters.0"),
    ({"clusters": ["/no/such.yaml"]}, "/no/such.yaml"),
    ({"clusters": [{"nme": "a"}]}, "nme"),
    (
        {"llm_configs": [{"model_loading_config": LOADING}] * 2},
        "two of them have the model name 'My/Model-7B'",
    ),
    (
        {"llm_configs": [{"model_loading_config": {"model_id": name}} for name in ("a/b", "a-b")]},
        "two of them have the cluster name 'a-b'",
    ),
    ({"llm_configs": [{"model_loading_config": LOADING}], "max_body_size": 0}, "max_body_size"),
    (
        {"llm_configs": [{"model_loading_config": LOADING}], "chat_template": "/no/such"},
        "chat template '/no/such'",
    ),
    (
        {"llm_configs": [{"model_loading_config": LOADING, "engine_kwargs": {"max_num_seq": 1}}]},
        "max_num_seqs",
    ),
    (
        {"llm_configs": [{"model_loading_config": LOADING, "engine_kwargs": {"speculative_config": "x"}}]},
        "speculative_config must be a mapping, not 'x'",
    ),
    (
        {"llm_configs": [{**FULL, "placement_group_config": {"bundles": [{"CPU": 1}]}}]},
        "bundles must be 2 that are alike",
    ),
    (
        {"llm_configs": [{**FULL, "placement_group_config": {"bundles": [{"CPU": 1}, {"CPU": 2}]}}]},
        "bundles must be 2 that are alike",
    ),
    (
        {"llm_configs": [{**FULL, "placement_group_config": {"bundles": [{}], "strategy": "SPREAD"}}]},
        "strategy must be STRICT_PACK, not 'SPREAD'",
    ),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[str(given)[-60:] for given, _ in WRONG])
def test_what_is_not_possible_is_named_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError) as refused:
        OpenAIAppConfig.parse(given).models()
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_how_models_are_offered(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("template")
    (tmp_path / "cluster.yaml").write_text("name: other\ntarget: {model: ./b}\n")
    config = OpenAIAppConfig.parse(
        {
            "llm_configs": [{"model_loading_config": LOADING}],
            "clusters": [str(tmp_path / "cluster.yaml"), {"name": "third", "target": {"model": "./c"}}],
            "chat_template": str(tmp_path / "chat.jinja"),
            "max_tokens": 10,
            "max_choices": 3,
            "max_waiting": 1.5,
        }
    )
    models = config.models()
    assert [cluster.name for cluster, _ in models] == ["my-model-7b", "other", "third"]
    assert models[0][1].names == ("My/Model-7B",)
    assert [settings.names for _, settings in models[1:]] == [(each.served_name,) for each, _ in models[1:]]
    for _, settings in models:
        assert settings.chat_template == "template"
        assert (settings.limits.max_tokens, settings.limits.max_choices) == (10, 3)
        assert settings.waiting_per_slot == 1.5


@pytest.mark.parametrize(
    ("own", "of_cluster", "expected"),
    [
        ({}, {"max_tokens": 7, "max_choices": 2}, (7, 2)),
        ({"max_tokens": 9, "max_choices": 1}, {"max_tokens": 7, "max_choices": 2}, (7, 1)),
        ({"max_tokens": 5}, {"max_tokens": 7}, (5, 128)),
        ({}, {}, (None, 128)),
    ],
)
def test_the_limits_of_a_cluster_count_over_http_too(
    own: dict[str, int], of_cluster: dict[str, int], expected: tuple[int | None, int]
) -> None:
    cluster = {"target": {"model": "./a"}, "limits": of_cluster}
    ((_, settings),) = OpenAIAppConfig.parse({"clusters": [cluster], **own}).models()
    assert (settings.limits.max_tokens, settings.limits.max_choices) == expected


# Loading Ray Serve brings it.
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 8001), ("0.0.0.0", 8000)])
def test_a_serve_that_listens_elsewhere_is_not_taken(
    host: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.serve.config import HTTPOptions

    from outrider.cluster import serve as cluster_serve

    running = SimpleNamespace(http_config=HTTPOptions(host="127.0.0.1", port=8000))
    monkeypatch.setattr(cluster_serve, "_get_global_client", lambda **_: running)
    with pytest.raises(
        ClusterError, match=f"at 127.0.0.1, port 8000, and cannot listen at {host}, port {port}"
    ):
        cluster_serve._require_address(host, port)
    cluster_serve._require_address("127.0.0.1", 8000)
