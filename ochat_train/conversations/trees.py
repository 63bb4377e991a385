"""Trees of messages: ChatGPT's own export and OpenAssistant's, as paths from the first message to an answer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ochat_train.conversations.roles import find_role


@dataclass(slots=True)
class Node:
    """A message: its turn, None where it is hidden or empty, and the messages that answer it.

    own: its fields that are neither lists nor objects. unread: what was met in it and not read.
    """

    turn: dict[str, Any] | None
    own: dict[str, Any] = field(default_factory=dict)
    children: list["Node"] = field(default_factory=list)
    parent: "Node | None" = None
    unread: tuple[tuple[str, str], ...] = ()

    @property
    def is_answer(self) -> bool:
        """Whether it is an assistant's text, not only its reasoning."""
        turn = self.turn
        return turn is not None and "reasoning_content" not in turn and find_role(turn["role"]) == "assistant"


@dataclass(frozen=True, slots=True)
class Tree:
    """A tree of messages; `last` ends its best path."""

    root: Node
    last: Node

    def answers(self) -> list[Node]:
        """Every answer, parents first."""
        found, waiting = [], [self.root]
        while waiting:
            node = waiting.pop()
            found += [node] if node.is_answer else []
            waiting += reversed(node.children)
        return found


def path_to(node: Node) -> list[Node]:
    """The messages from the root to this one."""
    path, seen = [node], {id(node)}
    while (parent := path[-1].parent) is not None and id(parent) not in seen:  # damaged exports have circles
        path.append(parent)
        seen.add(id(parent))
    return path[::-1]


# ---- OpenAssistant ----


def read_replies(prompt: Mapping[str, Any]) -> Tree:
    """The tree of a message with `replies`. The best path goes to the reply of the least rank that is not deleted."""
    root = _message(prompt)
    waiting: list[tuple[Node, Mapping[str, Any]]] = [(root, prompt)]
    while waiting:
        node, message = waiting.pop()
        replies = message.get("replies")
        for reply in replies if isinstance(replies, list) else ():
            if isinstance(reply, dict):
                child = _message(reply, node)
                node.children.append(child)
                waiting.append((child, reply))
    last = root
    while last.children:
        last = min(last.children, key=_badness)
    return Tree(root, last)


def _message(message: Mapping[str, Any], parent: Node | None = None) -> Node:
    own = {name: value for name, value in message.items() if not isinstance(value, list | dict) and name != "text"}
    return Node({"role": message.get("role"), "content": message.get("text")}, own, parent=parent)


def _badness(node: Node) -> tuple[bool, bool, float]:
    rank = node.own.get("rank")
    is_rank = isinstance(rank, int | float) and rank == rank
    return bool(node.own.get("deleted")), not is_rank, float(rank or 0.0) if is_rank else 0.0


# ---- ChatGPT ----


def read_mapping(mapping: Mapping[str, Any], current: Any) -> Tree | None:
    """The tree of a ChatGPT export's `mapping`, or None if it is none.

    The best path is the one that was shown last: to the node `current`, or where there is none, always to the last
    child. Hidden messages, empty ones and those of the user's profile have no turn.
    """
    entries = {name: entry for name, entry in mapping.items() if isinstance(entry, dict) and "message" in entry}
    nodes = {name: _shown(entry["message"]) for name, entry in entries.items()}
    for name, entry in entries.items():
        parent = entry.get("parent")
        if parent in nodes and parent != name:
            nodes[name].parent = nodes[parent]
    roots = [node for node in nodes.values() if node.parent is None]
    if not roots:  # nothing, or a circle
        return None
    for name, entry in entries.items():
        children = entry.get("children") or ()
        nodes[name].children = [
            nodes[child] for child in children if child in nodes and nodes[child].parent is nodes[name]
        ]
    for node in nodes.values():  # a parent that does not name its child
        if node.parent is not None and not any(node is child for child in node.parent.children):
            node.parent.children.append(node)
    root = next((node for node in roots if node.children), roots[0])
    last = nodes[current] if isinstance(current, str) and current in nodes else root
    while last.children and last is not nodes.get(str(current)):
        last = last.children[-1]
    return Tree(root, last)


_UNSHOWN = ("user_editable_context", "model_editable_context", "reasoning_recap")


def _shown(message: Any) -> Node:
    """A message of the export as a node."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), dict):
        return Node(None)
    author, content, metadata = message.get("author"), message["content"], message.get("metadata")
    role = author.get("role") if isinstance(author, dict) else None
    kind = content.get("content_type")
    is_hidden = isinstance(metadata, dict) and metadata.get("is_visually_hidden_from_conversation") is True
    if is_hidden or kind in _UNSHOWN:
        return Node(None)
    if kind == "thoughts":
        thoughts = [thought for thought in content.get("thoughts") or () if isinstance(thought, dict)]
        text = "\n\n".join(str(thought.get("content") or thought.get("summary") or "") for thought in thoughts)
        return Node({"role": role, "content": "", "reasoning_content": text}) if text else Node(None)
    said = _parts(content["parts"]) if isinstance(content.get("parts"), list) else content.get("text")
    if said is None:
        return Node(None, unread=(("turn field", f"content_type {kind}"),))
    if not said:
        return Node(None)
    turn: dict[str, Any] = {"role": role, "content": said}
    if role == "assistant" and message.get("recipient") not in (None, "", "all"):
        turn = {"role": "tool_call", "content": said if isinstance(said, str) else "".join(map(str, said))}
    if message.get("weight") == 0 and role == "assistant":
        turn["weight"] = 0
    return Node(turn)


def _parts(parts: Sequence[Any]) -> Any:
    """The text of a message's parts; a list of parts where one of them is no text."""
    read = [_part(part) for part in parts if part != ""]
    if all(isinstance(part, str) for part in read):
        return "\n\n".join(read)
    return read


def _part(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    kind = str(part.get("content_type"))
    if isinstance(part.get("text"), str):
        return part["text"]
    media = next((medium for medium in ("image", "video", "audio") if medium in kind), "file")
    return {"type": media}


def turns_on(path: Sequence[Node]) -> Iterator[dict[str, Any]]:
    """The turns of a path; reasoning that stands alone goes to the answer after it."""
    thoughts: list[str] = []
    for node in path:
        turn = node.turn
        if turn is None:
            continue
        if "reasoning_content" in turn:
            thoughts.append(turn["reasoning_content"])
            continue
        if thoughts and node.is_answer:
            turn = turn | {"reasoning_content": "\n\n".join(thoughts)}
            thoughts = []
        yield turn
