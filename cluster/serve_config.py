"""What ``build_openai_app`` is given: Ray's ``LLMConfig`` in its shape, or whole clusters."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from outrider.cluster.api.app import MAX_BODY
from outrider.cluster.api.calls import Limits
from outrider.cluster.api.service import WAITING_PER_SLOT, ModelSettings
from outrider.cluster.cluster_config import ClusterConfig, load_config, parse_config
from outrider.cluster.given_files import read_text
from outrider.cluster.nearest import nearest
from outrider.speculation.errors import InvalidConfigError

_OF_DRAFT_WORKERS = ("model", "method", "workers", "max_model_len", "draft_tensor_parallel_size")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ModelLoadingConfig(_Section):
    """model_id: what clients call it. model_source: folder or hub id; the same by default."""

    model_id: str = Field(min_length=1)
    model_source: str | None = None


class PlacementGroupConfig(_Section):
    """bundles: what each rank of a target takes, all alike. strategy: only STRICT_PACK."""

    bundles: list[dict[str, float]] = Field(min_length=1)
    strategy: str = "STRICT_PACK"


class DeploymentConfig(_Section):
    """num_replicas: targets. Clients wait in the server's own queue, see ``max_waiting``."""

    num_replicas: int = Field(default=1, ge=1)


class LLMConfig(_Section):
    """One model, in the shape of ``ray.serve.llm``'s.

    engine_kwargs: what a cluster's ``target`` takes, and ``speculative_config``, whose ``workers`` is how
    many draft workers there are.
    """

    model_loading_config: ModelLoadingConfig
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    accelerator_type: str | None = None
    placement_group_config: PlacementGroupConfig | None = None
    deployment_config: DeploymentConfig = DeploymentConfig()


class OpenAIAppConfig(_Section):
    """Everything that the application is built from.

    llm_configs: models. clusters: beside them, paths of cluster.yaml files or their contents.
    api_key_file: see ``api_keys``; on the nodes of the ingress. max_waiting: see ``Admission``.
    num_replicas: of the ingress.
    """

    llm_configs: list[LLMConfig] = Field(default_factory=list)
    clusters: list[str | dict[str, Any]] = Field(default_factory=list)
    chat_template: str | None = None
    api_key_file: str | None = None
    max_body_size: int = Field(default=MAX_BODY, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_choices: int = Field(default=128, ge=1)
    max_waiting: float = Field(default=WAITING_PER_SLOT, ge=0)
    num_replicas: int = Field(default=1, ge=1)

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> "OpenAIAppConfig":
        """
        Raises:
            InvalidConfigError: a key is unknown or a value is not possible; one line.
        """
        try:
            config = cls.model_validate(dict(given))
        except ValidationError as error:
            raise InvalidConfigError("; ".join(_problems(error))) from None
        if not config.llm_configs and not config.clusters:
            raise InvalidConfigError("llm_configs or clusters must name at least one model")
        return config

    def models(self) -> list[tuple[ClusterConfig, ModelSettings]]:
        """Each model's cluster, and how it is offered.

        Raises:
            InvalidConfigError: a cluster is not possible, or two models have one name.
        """
        template = None if self.chat_template is None else read_text(self.chat_template, "chat template")
        found = [(cluster_of(each), each.model_loading_config.model_id) for each in self.llm_configs]
        for each in self.clusters:
            cluster = load_config(each) if isinstance(each, str) else parse_config(each, "clusters")
            found.append((cluster, cluster.served_name))
        for kind, names in (
            ("model", [name for _, name in found]),
            ("cluster", [one.name for one, _ in found]),
        ):
            if len(set(names)) < len(names):
                raise InvalidConfigError(f"two of them have the {kind} name {max(names, key=names.count)!r}")
        return [
            (
                cluster,
                ModelSettings(
                    names=(name,),
                    chat_template=template,
                    limits=Limits(max_tokens=self.max_tokens, max_choices=self.max_choices),
                    waiting_per_slot=self.max_waiting,
                ).within(cluster.limits.max_tokens, cluster.limits.max_choices),
            )
            for cluster, name in found
        ]


def cluster_of(model: LLMConfig) -> ClusterConfig:
    """The cluster that serves a model.

    Raises:
        InvalidConfigError: a setting has no counterpart.
    """
    engine = dict(model.engine_kwargs)
    speculative = engine.pop("speculative_config", None)
    for name in ("model", "replicas", "accelerator_type"):
        if name in engine:
            raise InvalidConfigError(f"engine_kwargs.{name} stands elsewhere in an LLMConfig")
    loading = model.model_loading_config
    target = {
        "model": loading.model_source or loading.model_id,
        "replicas": model.deployment_config.num_replicas,
        "accelerator_type": model.accelerator_type,
        **_rank(model.placement_group_config, engine.get("tensor_parallel_size", 1)),
        **engine,
    }
    draft, speculation = _drafting(speculative)
    name = re.sub(r"[^a-z0-9]+", "-", loading.model_id.lower()).strip("-")[-30:].lstrip("-0123456789")
    return parse_config(
        {
            "name": name or "model",
            "address": "auto",
            "target": target,
            "draft": draft,
            "speculation": speculation,
        },
        f"the configuration of {loading.model_id}",
    )


def _rank(group: PlacementGroupConfig | None, size: Any) -> dict[str, Any]:
    if group is None:
        return {}
    if group.strategy not in ("STRICT_PACK", "PACK"):
        raise InvalidConfigError(
            f"placement_group_config.strategy must be STRICT_PACK, not {group.strategy!r}"
        )
    first, *others = group.bundles
    if any(each != first for each in others) or len(group.bundles) != size:
        raise InvalidConfigError(
            f"placement_group_config.bundles must be {size} that are alike, one for each rank, "
            f"not {group.bundles}"
        )
    taken = dict(first)
    return {"num_cpus": taken.pop("CPU", 0.0), "num_gpus": taken.pop("GPU", 0.0), "resources": taken}


def _drafting(given: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """vLLM's ``speculative_config`` as draft pools and what goes with them."""
    if given is None:
        return [], {}
    if not isinstance(given, Mapping):
        raise InvalidConfigError(f"speculative_config must be a mapping, not {given!r}")
    rest = {key: value for key, value in given.items() if key not in _OF_DRAFT_WORKERS}
    method = given.get("method", "draft_model" if "model" in given else "ngram")
    if method == "ngram":
        return [{"method": "ngram"}], rest
    pool = {"method": method, "model": given.get("model"), "replicas": given.get("workers", 1)}
    if "max_model_len" in given:
        pool["max_model_len"] = given["max_model_len"]
    if "draft_tensor_parallel_size" in given:
        pool["tensor_parallel_size"] = given["draft_tensor_parallel_size"]
    return [pool], rest


def _problems(error: ValidationError) -> Iterator[str]:
    for each in error.errors():
        where = ".".join(str(part) for part in each["loc"])
        if each["type"] == "extra_forbidden":
            known = {name for one in _SECTIONS for name in one.model_fields}
            yield f"unknown key {where!r}; did you mean {nearest(str(each['loc'][-1]), known)!r}?"
        else:
            yield f"{where} {each['msg'].removeprefix('Input ')}, not {each['input']!r}"


_SECTIONS = (OpenAIAppConfig, LLMConfig, ModelLoadingConfig, PlacementGroupConfig, DeploymentConfig)
