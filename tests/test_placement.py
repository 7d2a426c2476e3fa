"""Whether a cluster can hold a recipe: counted by hand, against brute force, and on clusters that are and that may grow."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undo_ray import placement
from undo_ray.config import Recipe
from undo_ray.placement import Ask, Kind, holds

HEAD = Kind("head", (0.0, 0.0), 1)


def recipe(teacher: dict[str, Any], student: dict[str, Any], workers: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "data": {"train": "gsm8k"},
            "teacher": {"model": "big/teacher", "engine": {"kind": "vllm", **teacher}},
            "student": {"model": "small/student", "tokens": 1000, "engine": {"kind": "vllm", **student}, **workers},
        }
    )


EIGHT = recipe(
    {"replicas": 4, "tensor_parallel": 4, "resources": {"cpus": 2, "gpus": 4}},
    {"replicas": 8, "resources": {"cpus": 2, "gpus": 1}},
    {"workers": 8, "resources": {"cpus": 4, "gpus": 1}},
)


@pytest.mark.parametrize(
    ("types", "limit", "wanting"),
    [
        ([Kind("gpu", (8.0, 96.0), 2)], 2, []),
        ([Kind("gpu", (8.0, 96.0), 2)], 1, ["teacher.engine"]),  # 16 GPUs want two nodes
        ([Kind("gpu", (2.0, 96.0), 8)], 9, ["teacher.engine"]),  # 16 GPUs, but no node with 4
        ([Kind("gpu", (4.0, 8.0), 4)], 9, []),
        ([Kind("gpu", (8.0, 8.0), 2)], 9, ["student.engine", "student.workers"]),  # no CPU to grade on; 32 CPUs for 8 workers
        ([Kind("gpu", (8.0, 8.0), 2), Kind("cpu", (0.0, 16.0), 1)], 9, ["student.workers"]),
    ],
)
def test_what_a_cluster_cannot_hold_at_a_time(types: list[Kind], limit: int, wanting: list[str]) -> None:
    assert [ask.key for ask in placement.asked(EIGHT) if not holds(ask, [HEAD], types, limit)] == wanting
    there = [Kind(f"{kind.name}-{n}", kind.each, 1) for kind in types for n in range(min(kind.n, limit))]
    assert [ask.key for ask in placement.asked(EIGHT) if not holds(ask, there)] == wanting, "the same when they are there"


def test_a_type_without_a_limit_takes_no_longer() -> None:
    """KubeRay's default of `maxReplicas`."""
    endless = 2**31 - 1
    assert all(holds(ask, [HEAD], [Kind("gpu", (8.0, 96.0), endless)], endless) for ask in placement.asked(EIGHT))


def test_kept_engines_lie_beside_every_stage() -> None:
    kept = recipe(
        {"lifetime": "run", "tensor_parallel": 4, "resources": {"cpus": 2, "gpus": 4}},
        {"resources": {"cpus": 2, "gpus": 1}},
        {"workers": 8, "resources": {"cpus": 4, "gpus": 1}},
    )
    node = [Kind("gpu", (8.0, 96.0), 1)]
    [ask] = [ask for ask in placement.asked(kept) if not holds(ask, node)]
    assert ask.key == "student.workers" and 'teacher.engine (lifetime = "run")' in ask.note
    assert all(holds(ask, 2 * node) for ask in placement.asked(kept))


def test_a_kept_student_leaves_room_for_the_check_of_an_export() -> None:
    kept = recipe(
        {"resources": {"cpus": 2, "gpus": 1}},
        {"lifetime": "run", "replicas": 2, "resources": {"cpus": 1, "gpus": 1}},
        {"resources": {"cpus": 2}},  # trained without GPUs, so that no worker leaves one
    )
    wanting = [ask.note for ask in placement.asked(kept) if not holds(ask, [Kind("gpu", (2.0, 16.0), 1)])]
    assert wanting[-1].endswith("to check an export")
    assert all(holds(ask, [Kind("gpu", (3.0, 16.0), 1)]) for ask in placement.asked(kept))
    [alone] = placement.asked(kept, training=False)
    assert holds(alone, [Kind("gpu", (2.0, 16.0), 1)]), "an evaluation trains nothing"


def test_an_engine_over_two_nodes_wants_half_of_its_gpus_on_each() -> None:
    wide = {"lifetime": "run", "tensor_parallel": 8, "pipeline_parallel": 2, "nodes": 2, "resources": {"cpus": 8, "gpus": 16}}
    asks = placement.asked(recipe(wide, {"resources": {"gpus": 1}}, {"resources": {"gpus": 1}}))
    assert (asks[0].key, asks[0].n, asks[0].each) == ("teacher.engine", 2, (8.0, 4.0))
    node = Kind("gpu", (8.0, 96.0), 1)
    assert not holds(asks[0], [Kind("gpu", (15.0, 96.0), 1)]) and holds(asks[0], [node, node])
    assert not holds(asks[1], [node, node]), "both nodes are the teacher's while it is kept"
    assert all(holds(ask, [node, node, node]) for ask in asks)


shapes = st.tuples(st.integers(0, 4), st.integers(0, 4)).map(lambda shape: (float(shape[0]), float(shape[1])))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4), shapes, st.lists(shapes, min_size=1, max_size=3))
def test_equal_parts_are_held_exactly_when_counting_says_so(count: int, each: tuple[float, float], nodes: list[Any]) -> None:
    def room(node: tuple[float, float]) -> float:
        return min((have // need for have, need in zip(node, each, strict=True) if need), default=float("inf"))

    kinds = [Kind(str(number), node, 1) for number, node in enumerate(nodes)]
    assert holds(Ask("x", count, each, []), kinds) == (sum(map(room, nodes)) >= count)


@settings(max_examples=300, deadline=None)
@given(st.lists(shapes, min_size=1, max_size=4), st.lists(shapes, min_size=1, max_size=2))
def test_what_is_held_can_be_laid_out(parts: list[Any], nodes: list[Any]) -> None:
    """Never a yes that no layout bears out; a no may be too strict for parts of many shapes."""

    def lies(layout: tuple[int, ...]) -> bool:
        return all(
            sum(part[kind] for part, at in zip(parts, layout, strict=True) if at == number) <= node[kind]
            for number, node in enumerate(nodes)
            for kind in (0, 1)
        )

    kinds = [Kind(str(number), node, 1) for number, node in enumerate(nodes)]
    if holds(Ask("x", 1, parts[0], parts[1:]), kinds):
        assert any(lies(layout) for layout in itertools.product(range(len(nodes)), repeat=len(parts)))


def test_an_autoscalers_configuration_says_how_far_a_cluster_grows() -> None:
    config = {
        "max_workers": 3,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "max_workers": 0},
            "teacher": {"resources": {"CPU": 96, "GPU": 8}, "max_workers": 8},
            "cpu": {"resources": {"CPU": 16}, "max_workers": 2},
        },
    }
    types, limit = placement.grown(config)
    assert types == [Kind("teacher", (8.0, 96.0), 8), Kind("cpu", (0.0, 16.0), 2)] and limit == 3
    assert all(holds(ask, [HEAD], types, limit) for ask in placement.asked(EIGHT))


def test_a_rayclusters_groups_say_so_too() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    def group(cpus: int, gpus: int) -> dict[str, Any]:
        limits = {"cpu": cpus, "memory": "64Gi", **({"nvidia.com/gpu": gpus} if gpus else {})}
        container = {"name": "ray", "image": "ray", "resources": {"limits": limits, "requests": limits}}
        return {"rayStartParams": {}, "template": {"spec": {"containers": [container]}}}

    spec = {
        "headGroupSpec": {**group(4, 0), "rayStartParams": {"num-cpus": "0"}},
        "workerGroupSpecs": [{"groupName": "teacher", "minReplicas": 0, "maxReplicas": 2, "replicas": 0, **group(96, 8)}],
    }
    config = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "undo", "namespace": "default"}, "spec": spec})
    assert placement.grown(config) == ([Kind("teacher", (8.0, 96.0), 2)], 2)
