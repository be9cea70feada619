"""Every file in deploy/ is one that its program takes, and names only what exists."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from outrider.cluster.api.metrics import Metrics
from outrider.cluster.cluster_config import load_config, parse_config
from outrider.cluster.serve_config import OpenAIAppConfig

# Of Ray Serve, when its schema is imported.
pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERAY = DEPLOY / "kuberay"
MONITORING = DEPLOY / "monitoring"
SCHEMAS = Path(os.environ.get("KUBERAY_SCHEMAS", "/nonexistent"))
"""A folder with KubeRay's CRDs as JSON Schema (crd-rayservices-v1.json, ...), where there is one."""


def documents(path: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(path.read_text(encoding="utf-8")) if each is not None]


def test_every_file_is_listed() -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.name != "README.md":
            parts = path.relative_to(DEPLOY).parts
            assert f"`{parts[0]}/`" in text or f"`{'/'.join(parts)}`" in text, path


@pytest.mark.parametrize("name", ["local.yaml", "cluster.example.yaml"])
def test_clusters_are_possible(name: str) -> None:
    assert load_config(DEPLOY / name).target.num_cpus


def test_serve_s_configuration_has_only_keys_that_serve_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    config = documents(DEPLOY / "serve.example.yaml")[0]
    check_serve_config(config, monkeypatch)
    with pytest.raises(AssertionError, match="rout_prefix"):
        check_serve_config({"applications": [{"rout_prefix": "/", "import_path": "a:b"}]}, monkeypatch)


def check_serve_config(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With Serve's schema, which lets unknown keys pass, and with our own builder's."""
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(config)
    strange = list(unknown_keys(config, ServeDeploySchema))
    assert not strange, strange
    for application in config["applications"]:
        assert application["import_path"] == "outrider.cluster.serve:build_openai_app"
        monkeypatch.setattr("pathlib.Path.exists", lambda _: True)
        models = OpenAIAppConfig.parse(application["args"]).models()
        monkeypatch.undo()
        assert models


def unknown_keys(given: Any, schema: type[BaseModel], where: str = "") -> Iterator[str]:
    for name, value in given.items():
        field = schema.model_fields.get(name)
        if field is None:
            yield f"{where}{name}"
            continue
        inner = list(_models_in(field.annotation))
        for one in value if isinstance(value, list) else [value]:
            if inner and isinstance(one, dict):
                yield from unknown_keys(one, inner[0], f"{where}{name}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for each in getattr(annotation, "__args__", ()):
        yield from _models_in(each)


def test_kuberay_s_files_hold_configurations_that_serve_and_outrider_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = documents(KUBERAY / "rayservice.yaml")[0]
    embedded = yaml.safe_load(service["spec"]["serveConfigV2"])
    check_serve_config(embedded, monkeypatch)
    (cluster,) = embedded["applications"][0]["args"]["clusters"]
    labels = {parse_config(cluster, "rayservice").target.labels["tier"]}
    labels |= {pool.labels["tier"] for pool in parse_config(cluster, "rayservice").draft}
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert {group["rayStartParams"]["labels"].removeprefix("tier=") for group in groups} == labels


@pytest.mark.parametrize("path", sorted(KUBERAY.glob("*.yaml")), ids=lambda path: path.name)
def test_kubernetes_objects_fit_their_schemas(path: Path) -> None:
    for document in documents(path):
        kind = document["kind"].lower()
        if not document["apiVersion"].startswith("ray.io/"):
            kubernetes_validate = pytest.importorskip("kubernetes_validate")
            kubernetes_validate.validate(document, "1.34", strict=True)
            continue
        file = SCHEMAS / f"crd-{kind}s-v1.json"
        if not file.exists():
            pytest.skip("KUBERAY_SCHEMAS names no folder with KubeRay's CRDs")
        schema = strict(json.loads(file.read_text(encoding="utf-8")))
        errors = [
            f"{each.json_path}: {each.message}" for each in Draft202012Validator(schema).iter_errors(document)
        ]
        assert not errors, errors


def strict(schema: Any) -> Any:
    """With unknown keys as errors, and Kubernetes' numbers that may be text."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: strict(value) for key, value in schema.items()}
    if "properties" in made and "additionalProperties" not in made:
        made["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    return made


def test_ray_s_token_is_on_wherever_ray_listens() -> None:
    for name in ("rayservice.yaml", "rayjob.yaml"):
        spec = documents(KUBERAY / name)[0]["spec"]
        cluster = spec.get("rayClusterConfig") or spec["rayClusterSpec"]
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    launcher = documents(DEPLOY / "ray-up.example.yaml")[0]
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert all("RAY_AUTH_MODE=token" in each for each in launcher[name] if " start " in each)


def test_ray_up_s_file_fits_its_schema() -> None:
    import ray

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    Draft202012Validator(schema).validate(documents(DEPLOY / "ray-up.example.yaml")[0])


def exported() -> set[str]:
    """Every name that a server exports, histograms' parts included."""
    metrics = Metrics(["m"])
    samples = {sample.name for family in metrics.registry.collect() for sample in family.samples}
    for family in metrics.registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(
            family.type, ("",)
        )
        samples |= {family.name + suffix for suffix in suffixes}
    return samples


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:vllm:|outrider_)\w+", expression))


def test_the_dashboard_names_only_metrics_that_exist() -> None:
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [
        each["query"]["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"
    ]
    named = set().union(*map(names_in, expressions))
    assert len(named) > 15
    assert named <= exported(), named - exported()


def test_the_rules_name_only_metrics_that_exist() -> None:
    (group,) = documents(MONITORING / "rules.yaml")[0]["groups"]
    recorded = {rule["record"] for rule in group["rules"] if "record" in rule}
    for rule in group["rules"]:
        assert ("record" in rule) != ("alert" in rule)
        assert names_in(rule["expr"]) <= exported(), rule
        assert set(re.findall(r"\boutrider:[\w:]+", rule["expr"])) <= recorded
        assert set(re.findall(r"\$labels\.(\w+)", str(rule.get("annotations", "")))) <= {"model_name"}


def test_images_do_not_run_as_root_and_start_the_program_itself() -> None:
    for path in (DEPLOY / "docker").glob("Dockerfile.*"):
        lines = path.read_text(encoding="utf-8").splitlines()
        users = [line for line in lines if line.startswith("USER ")]
        assert users == ["USER 1000"], path
        assert 'ENTRYPOINT ["outrider"]' in lines, path


def test_the_service_calls_a_command_line_that_exists() -> None:
    from outrider.cluster.cli.commands import _parsers

    text = (DEPLOY / "systemd" / "outrider.service").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ExecStart=/opt/outrider/bin/outrider (.+)$", text, re.MULTILINE)
    assert _parsers()[0].parse_args(line.split()).target == "REPLACE_MODEL"
    compose = documents(DEPLOY / "docker" / "compose.yaml")[0]
    assert _parsers()[0].parse_args(compose["services"]["server"]["command"]).workers == "local:1"
    job = documents(KUBERAY / "rayjob.yaml")[0]
    assert job["spec"]["entrypoint"].startswith("outrider run-batch ")
