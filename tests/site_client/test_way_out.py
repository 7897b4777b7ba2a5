"""There is one way out of a site: whatever has something of it to say to the coordinator is sent by `releases.py`.

Read from the code: which calls there are that can send something, and that each is made by the gate.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from locum.common.proto import locum_pb2 as pb

FOLDER = Path(__file__).resolve().parents[2] / "site_client"
#: The calls of the service Registry, and of them those whose request has a field that could hold something.
CALLS = {method.name: method.input_type for method in pb.DESCRIPTOR.services_by_name["Registry"].methods}
SPEAKING = {name for name, request in CALLS.items() if request.fields}
#: What sends a reply, and what sends its tensors.
SENDERS = {"push", "deliver", "upload"}


def _trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(FOLDER.rglob("*.py")):
        yield str(path.relative_to(FOLDER)), ast.parse(path.read_text())


def _calls(tree: ast.AST, names: set[str]) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names
    ]


def _gated(tree: ast.Module) -> set[ast.AST]:
    """Everything that is handed to a method of the gate: within its arguments, or in a function that is named there."""
    gates = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and re.search(r"(^|\.)releases$", ast.unparse(node.func.value))
    ]
    arguments = [argument for gate in gates for argument in (*gate.args, *(one.value for one in gate.keywords))]
    named = {argument.id for argument in arguments if isinstance(argument, ast.Name)}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in named]
    return {node for root in (*arguments, *functions) for node in ast.walk(root)}


def test_a_call_of_the_registry_that_can_say_something_is_made_by_the_gate() -> None:
    found = []
    for name, tree in _trees():
        gated = _gated(tree)
        for call in _calls(tree, SPEAKING):
            found.append((name, call.func.attr))  # type: ignore[attr-defined]
            assert call in gated, f"{name}, line {call.lineno}: {ast.unparse(call)}"
    assert {call for _, call in found} == SPEAKING


@pytest.mark.parametrize(
    ("code", "gated"),
    [
        ("self.releases.decision(e, lambda: guarded(lambda: stub.Approve(r)))", True),
        ("def call():\n    return stub.Approve(r)\nreleases.cosignature(line, call)", True),
        ("stub.Approve(r)", False),
        ("self.journal.decision(e, lambda: stub.Approve(r))", False),
        ("self.releases.decision(e, lambda: None)\nstub.Approve(r)", False),
    ],
)
def test_a_call_beside_the_gate_would_be_found(code: str, gated: bool) -> None:
    tree = ast.parse(code)
    (call,) = _calls(tree, {"Approve"})
    assert (call in _gated(tree)) is gated


def test_a_reply_and_its_tensors_are_sent_by_the_gate() -> None:
    for name, tree in _trees():
        gated = _gated(tree)
        for call in _calls(tree, SENDERS):
            assert isinstance(call.func, ast.Attribute)
            if (name, call.func.attr) == ("carrier.py", "upload"):
                continue  # this is `deliver`
            assert call in gated, f"{name}, line {call.lineno}: {ast.unparse(call)}"
    (service,) = [tree for name, tree in _trees() if name == "service.py"]
    assert {call.func.attr for call in _calls(service, SENDERS)} == {"push", "deliver"}  # type: ignore[attr-defined]


#: Who may open a way out at all, and why.
WAYS = {
    "grpc": {
        "blobs.py",  # the service Blobs
        "doctor.py",  # greets, and says nothing
        "enrolment.py",  # opens the connection
        "fleet.py",  # the tunnel to Flower
        "pulse.py",  # names the channel
        "service.py",  # names the channel
        "start.py",  # names the channel
        "witness.py",  # names the channel
    },
    "socket": {
        "probe.py",  # looks whether somebody answers
        "desk/serve.py",  # listens on loopback, for the site's own staff
        "imaging/retrieve/dimse.py",  # asks the hospital's PACS
    },
    "ssl": {"probe.py", "imaging/retrieve/dicomweb.py"},
    "requests": {"imaging/retrieve/dicomweb.py"},  # asks the hospital's PACS
    "urllib3": {"imaging/retrieve/dicomweb.py"},
    "dicomweb_client": {"imaging/retrieve/dicomweb.py"},
    "pynetdicom": {"imaging/retrieve/dimse.py"},
    "httpx": {"fleet.py"},  # Flower's client, whose calls the tunnel carries
    "flwr": {"agent.py", "fleet.py", "gate.py", "journal.py", "releases.py", "service.py"},
}
NEVER = {"aiohttp", "smtplib", "ftplib", "telnetlib", "xmlrpc", "http.client", "urllib.request"}


def _imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("package", WAYS)
def test_a_way_out_is_opened_by_few_modules(package: str) -> None:
    users = {name for name, tree in _trees() if any(found.partition(".")[0] == package for found in _imports(tree))}
    assert users <= WAYS[package], users - WAYS[package]


def test_no_module_knows_another_way_to_send() -> None:
    for name, tree in _trees():
        assert not _imports(tree) & NEVER, name


def test_an_agent_knows_neither_the_pacs_nor_the_pages_of_the_desk() -> None:
    """What speaks to the hospital's own machines is never in the process that speaks to the coordinator."""
    code = "import sys, locum.site_client.service, locum.site_client.start; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "locum.site_client.service" in loaded
    beside = ("locum.site_client.imaging.retrieve.", "locum.site_client.desk.", "pynetdicom", "dicomweb_client")
    assert not [name for name in loaded if name.startswith(beside)]


def test_calls_of_flowers_protocol_are_made_in_one_module_and_those_with_content_in_one_function() -> None:
    for name, tree in _trees():
        if name != "fleet.py":
            assert not [node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute) and _stub(node)]
            continue
        (push,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "push"]
        used = {ast.unparse(node) for node in ast.walk(push) if isinstance(node, ast.Name)}
        assert {"PushMessagesRequest", "make_push_object_fn_protobuf"} <= used
        elsewhere = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node not in set(ast.walk(push))]
        assert not {"PushMessagesRequest", "make_push_object_fn_protobuf"} & {node.id for node in elsewhere}


def _stub(node: ast.Name | ast.Attribute) -> bool:
    return (node.id if isinstance(node, ast.Name) else node.attr) == "FleetStub"


def test_no_line_of_a_log_is_sent_anywhere() -> None:
    """The handlers of a site's log: a file, and standard error."""
    handlers = set()
    for _, tree in _trees():
        names = [node.id if isinstance(node, ast.Name) else node.attr for node in ast.walk(tree) if _is_handler(node)]
        handlers |= set(names)
    assert handlers == {"RotatingFileHandler", "StreamHandler"}


def _is_handler(node: ast.AST) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.endswith("Handler") and name != "addHandler"
