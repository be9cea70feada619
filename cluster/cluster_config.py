"""``cluster.yaml``: what a cluster consists of and where it may run."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from outrider.cluster.kv_memory import parse_bytes
from outrider.cluster.nearest import nearest
from outrider.cluster.speculative_config import SpeculativeConfig
from outrider.models.demo import pair
from outrider.speculation.errors import InvalidConfigError

Dtype: TypeAlias = Literal["auto", "bfloat16", "float32", "float64"]
Device: TypeAlias = Literal["auto", "cpu", "cuda"]
MAX_REPLICAS = 1024
_NAME = r"^[a-z][a-z0-9-]{0,30}$"
_IN_WORDS = {
    _NAME: "must be lower-case letters, digits and hyphens",
    (_ADDRESS := r"^(local|auto|[^\s:/]+:[0-9]{1,5})$"): "must be local, auto or host:port",
    (_INTERFACE := r"^[^\s/]{1,15}$"): "must be the name of a network interface",
}
"""What patterns ask for."""


class _Section(BaseModel):
    """Unknown keys are errors, and so are values of another type: YAML has types of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Resources(_Section):
    """What one process takes, in Ray's terms, and on which nodes it may run.

    num_gpus may be a fraction. labels: that the node must have. threads: of PyTorch; by default
    as many as CPUs. device: of the model; auto is CUDA where the process has a GPU.
    tensor_parallel_size: processes that share a model, each of which takes all this, or, of a draft
    worker, all of which do.
    """

    tensor_parallel_size: int = Field(default=1, ge=1, le=64)
    num_cpus: float = Field(default=1, ge=0, le=4096)
    num_gpus: float = Field(default=0, ge=0, le=64)
    resources: dict[str, float] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    accelerator_type: str | None = None
    threads: int | None = Field(default=None, ge=1, le=4096)
    device: Device = "auto"

    @model_validator(mode="after")
    def _has_its_device(self) -> "Resources":
        if self.device == "cuda" and not self.num_gpus:
            raise ValueError("device 'cuda' needs num_gpus above 0")
        if self.own_device != "cpu" and self.tensor_parallel_size > 1 and self.num_gpus < self._gpus_of_ranks:
            raise ValueError(
                f"tensor_parallel_size {self.tensor_parallel_size} needs num_gpus {self._gpus_of_ranks} "
                f"at least, for each rank takes a whole one, not {self.num_gpus:g}"
            )
        return self

    @property
    def _gpus_of_ranks(self) -> int:
        """What one process must have where ranks compute on GPUs."""
        return 1

    @property
    def own_device(self) -> Device:
        """What the process is told: one without a GPU leaves those of its node alone."""
        return self.device if self.num_gpus else "cpu"

    @property
    def bundle(self) -> dict[str, float]:
        """As a bundle of a placement group."""
        amounts = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        if self.accelerator_type is not None:
            # How Ray itself spells it; enough to be placed beside one, for none is consumed.
            amounts[f"accelerator_type:{self.accelerator_type}"] = 0.001
        return {name: amount for name, amount in amounts.items() if amount}

    @property
    def num_threads(self) -> int:
        """Threads of PyTorch in one process."""
        return self.threads or max(1, int(self.num_cpus))


class TargetConfig(Resources):
    """The target: ``replicas`` groups of ``tensor_parallel_size`` processes on one node each.

    model: folder or hub id, looked up on the node that loads it; the embedded one by default. The
        rest from ``dtype`` on is what ``LLM`` takes.
    """

    model: str = str(pair.TARGET)
    replicas: int = Field(default=1, ge=1, le=MAX_REPLICAS)
    dtype: Dtype = "auto"
    numerics: Literal["canonical", "fast"] | None = None
    max_model_len: int | None = Field(default=None, ge=1)
    max_num_seqs: int = Field(default=8, ge=1, le=64)
    max_num_batched_tokens: int | None = Field(default=None, ge=1, le=2048)
    kv_cache_memory: int | str | None = None
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    enable_prefix_caching: bool = True
    target_profile: str | None = None
    quantization: None = None

    @model_validator(mode="after")
    def _rows_fit(self) -> "TargetConfig":
        probed = self.own_device == "cpu" or self.numerics == "canonical"
        if probed and self.max_num_batched_tokens is not None and self.max_num_batched_tokens > 64:
            raise ValueError(
                f"max_num_batched_tokens above 64 needs a GPU and numerics 'fast', "
                f"not {self.max_num_batched_tokens}"
            )
        return self

    @property
    def engine_settings(self) -> dict[str, Any]:
        """What ``LLM`` is given beside the model, by its names."""
        names = (
            "dtype", "numerics", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
            "kv_cache_memory", "gpu_memory_utilization", "enable_prefix_caching", "target_profile",
        )  # fmt: skip
        return {"device": self.own_device, **{name: getattr(self, name) for name in names}}

    @field_validator("quantization", mode="before")
    @classmethod
    def _its_own_numbers(cls, value: object) -> None:
        if value is not None:
            raise ValueError(f"must be a draft pool's, not {value!r}: the target's numbers must be its own")

    @field_validator("kv_cache_memory")
    @classmethod
    def _a_size(cls, value: int | str | None) -> int | None:
        try:
            return None if value is None else parse_bytes(value)
        except InvalidConfigError as error:
            raise ValueError(str(error).removeprefix("kv_cache_memory ")) from None


class DraftPoolConfig(Resources):
    """``replicas`` draft workers with a model, or a ``method`` that drafts beside the target.

    name: of the pool; its workers are NAME-0, NAME-1, ... model: as the target's.
    max_replicas: as many as there are when requests ask for it, ``replicas`` at least.
    method: ``draft_model``, the default, or ``ngram``, which takes no process. quantization: of the
        weights.
    """

    name: str = Field(default="draft", pattern=_NAME)
    method: Literal["draft_model", "ngram"] = "draft_model"
    model: str | None = None
    replicas: int = Field(default=1, ge=1, le=MAX_REPLICAS)
    max_replicas: int | None = Field(default=None, ge=1, le=MAX_REPLICAS)
    dtype: Dtype = "auto"
    max_model_len: int | None = Field(default=None, ge=1)
    max_sessions: int = Field(default=16, ge=1, le=4096)
    quantization: Literal["int8"] | None = None

    @model_validator(mode="after")
    def _fits_method(self) -> "DraftPoolConfig":
        if self.method == "ngram" and self.model is not None:
            raise ValueError(f"method 'ngram' takes no model, not {self.model!r}")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas must be at least replicas, {self.replicas}, not {self.max_replicas}"
            )
        if self.method == "ngram" and self.quantization is not None:
            raise ValueError(f"method 'ngram' has no weights, so quantization {self.quantization!r} must go")
        if self.own_device == "cuda" and self.quantization is not None:
            raise ValueError(f"quantization {self.quantization!r} is for CPUs, not for device 'cuda'")
        return self

    @property
    def _gpus_of_ranks(self) -> int:
        """See ``Resources``; all ranks share what a worker takes."""
        return self.tensor_parallel_size

    @property
    def most_replicas(self) -> int:
        """Workers that there may be."""
        return self.max_replicas or self.replicas


class LimitsConfig(_Section):
    """start_seconds: for a process to load its model. max_tokens, max_choices: of one request;
    None leaves the model's context as the only limit.
    """

    start_seconds: float = Field(default=300, gt=0)
    max_tokens: int | None = Field(default=None, ge=1)
    max_choices: int | None = Field(default=None, ge=1)


class SecurityConfig(_Section):
    """Files, read on the machine that brings the cluster up but for the certificates.

    token_file: the secret that targets show to draft workers; a fresh one by default.
    ray_token_file: Ray's own, where the Ray cluster asks for one.
    tls_ca, tls_certificate, tls_key: PEM files at these paths on every node.
    """

    token_file: str | None = None
    ray_token_file: str | None = None
    tls_ca: str | None = None
    tls_certificate: str | None = None
    tls_key: str | None = None

    @model_validator(mode="after")
    def _pairs(self) -> "SecurityConfig":
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key must be given together")
        return self


class NetworkConfig(_Section):
    """interface: the network interface of every node that carries drafts; Ray's by default."""

    interface: str | None = Field(default=None, pattern=_INTERFACE)


class ClusterConfig(_Section):
    """Everything that ``cluster.yaml`` says.

    address: ``local`` starts Ray on this machine alone, ``auto`` finds the Ray cluster that this
        machine belongs to, host:port is another's.
    draft: pools of draft workers; empty decodes plainly.
    speculation: ``speculative_config`` without model and method, and of its workers ``per_request`` only.
    """

    name: str = Field(default="outrider", pattern=_NAME)
    address: str = Field(default="local", pattern=_ADDRESS)
    target: TargetConfig = TargetConfig()
    draft: list[DraftPoolConfig] = Field(default_factory=list)
    speculation: dict[str, Any] = Field(default_factory=dict)
    limits: LimitsConfig = LimitsConfig()
    security: SecurityConfig = SecurityConfig()
    network: NetworkConfig = NetworkConfig()

    @field_validator("draft", mode="before")
    @classmethod
    def _one_pool_needs_no_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _fits_together(self) -> "ClusterConfig":
        names = [pool.name for pool in self.draft]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two draft pools are called {twice!r}; give each a name")
        if "target" in names:
            raise ValueError("a draft pool must not be called 'target'")
        if any(pool.method == "ngram" for pool in self.draft) and len(self.draft) > 1:
            raise ValueError("draft pools beside one of method 'ngram' are not supported yet")
        for pool in self.draft:
            if pool.method == "draft_model" and pool.model is None and self.target.model != str(pair.TARGET):
                raise ValueError(f"draft pool {pool.name!r} needs a model that fits the target's")
        for key in ("method", "model", "max_model_len", "quantization"):
            if key in self.speculation:
                raise ValueError(f"speculation: {key} belongs to a draft pool")
        workers = self.speculation.get("workers", {})
        if not isinstance(workers, Mapping) or not workers.keys() <= {"per_request"}:
            raise ValueError("speculation: workers may say per_request; all else belongs to draft pools")
        if self.speculation and not self.draft:
            raise ValueError("speculation is set, but no draft pool drafts")
        try:
            _ = self.speculative_config([])
        except InvalidConfigError as error:
            raise ValueError(str(error).replace("speculative_config", "speculation")) from None
        return self

    @property
    def served_name(self) -> str:
        """What clients of a server call the target where nothing else is said."""
        return "outrider-demo" if self.target.model == str(pair.TARGET) else self.target.model

    @property
    def worker_pools(self) -> list[DraftPoolConfig]:
        """Pools whose workers are processes."""
        return [pool for pool in self.draft if pool.method == "draft_model"]

    def speculative_config(self, addresses: Sequence[str]) -> dict[str, Any] | None:
        """What the target's engine is given, once these draft workers listen.

        Raises:
            InvalidConfigError: the ``speculation`` section is not possible.
        """
        if not self.draft:
            return None
        given: dict[str, Any] = {**self.speculation, "method": self.draft[0].method}
        if self.worker_pools:
            tls = {name: getattr(self.security, name) for name in ("tls_ca", "tls_certificate", "tls_key")}
            own = self.speculation.get("workers", {})
            given["workers"] = {**own, "addresses": list(addresses), "required": False, **tls}
        SpeculativeConfig.parse(given)
        return given


def load_config(path: str | Path) -> ClusterConfig:
    """Reads and checks a file.

    Raises:
        InvalidConfigError: it is missing, no YAML, or says something impossible; one line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidConfigError(f"{path} cannot be read: {reason}") from None
    try:
        values = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise InvalidConfigError(f"{path} is no YAML{where}: {getattr(error, 'problem', error)}") from None
    return parse_config({} if values is None else values, str(path))


def parse_config(values: Any, source: str) -> ClusterConfig:
    """Checks what a file called ``source`` says.

    Raises:
        InvalidConfigError: see ``load_config``.
    """
    if not isinstance(values, Mapping):
        raise InvalidConfigError(f"{source} must hold keys such as 'target:', not {values!r}")
    try:
        return ClusterConfig.model_validate(dict(values))
    except ValidationError as error:
        raise InvalidConfigError(f"{source}: {'; '.join(_problems(error))}") from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error; the library keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is no text", problem_mark=key_node.start_mark
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _problems(error: ValidationError) -> Iterator[str]:
    """A clause per problem, in the words of the file."""
    for each in error.errors():
        where = _where(each["loc"])
        if each["type"] == "extra_forbidden":
            yield f"{where}: unknown key; did you mean {nearest(str(each['loc'][-1]), _keys(each['loc']))!r}?"
        elif each["type"] == "value_error":
            reason = str(each["ctx"]["error"])
            yield f"{where} {reason}".strip() if reason.startswith("must") else _prefixed(where, reason)
        elif each["type"] == "string_pattern_mismatch":
            yield f"{where} {_IN_WORDS[each['ctx']['pattern']]}, not {each['input']!r}"
        else:
            message = each["msg"].removeprefix("Input ").replace("Input", "it")
            yield f"{where} {message}, not {each['input']!r}"


def _where(location: tuple[int | str, ...]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".")


def _keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys that may stand where this one does."""
    section: type[BaseModel] = ClusterConfig
    if len(location) > 1:
        section = (
            DraftPoolConfig if location[0] == "draft" else type(getattr(ClusterConfig(), str(location[0])))
        )
    return list(section.model_fields)


def _prefixed(where: str, reason: str) -> str:
    return f"{where}: {reason}" if where else reason
