"""A template as JSON, in manifests and in the metadata of models: what was trained is known without the recipe."""

from dataclasses import replace
from typing import Any

from ochat_train.conversations.base_template import BaseTemplate
from ochat_train.conversations.template import TEMPLATES, ChatTemplate, TemplatePart

Template = ChatTemplate | BaseTemplate
# The name of a built-in template; or {"template": name or pieces, "condition_in": ...}; with the
# template "base" also its source and its end token, which a recipe leaves to the base.
Description = str | dict[str, Any]


def read_template(description: Description) -> Template:
    """The template that a recipe, a store or a model describes. Raises ValueError for an unknown name."""
    if isinstance(description, str):
        description = {"template": description}
    named = description["template"]
    if named == "base":
        fields = {name: value for name, value in description.items() if name not in ("template", "variables")}
        return BaseTemplate(**fields, variables=tuple(sorted(description.get("variables", {}).items())))
    if isinstance(named, str):
        if named not in TEMPLATES:
            raise ValueError(f"there is no template {named} in this version; it has {', '.join(TEMPLATES)}")
        template = TEMPLATES[named]
    else:
        template = _read_pieces(named)
    place = description.get("condition_in")
    return template if place is None else replace(template, condition_in=place)


def describe_template(template: Template) -> Description:
    """What `read_template` makes the template of."""
    if isinstance(template, BaseTemplate):
        return {
            "template": "base",
            "condition_in": template.condition_in,
            "source": template.source,
            "end_token": template.end_token,
            "variables": dict(template.variables),
        }
    known = TEMPLATES.get(template.name)
    if known == template:
        return template.name
    if known is not None:
        return {"template": template.name, "condition_in": template.condition_in}
    parts = {name: [part.text for part in getattr(template, name)] for name in ("header", "system_header", "after_end")}
    pieces = {
        "bos": template.bos,
        "end": template.end_token,
        **parts,
        "special": [token for token in template.turn_tokens if token != template.end_token],
        "add": list(template.addable),
        "roles": dict(template.role_names),
        "inference_condition": template.inference_condition,
    }
    return {"template": pieces, "condition_in": template.condition_in}


def name_template(description: Description) -> str:
    """The template in a few words, for a person."""
    if isinstance(description, str):
        return description
    named = description["template"]
    name = named if isinstance(named, str) else "pieces of the recipe"
    return f"{name}, with the condition in {description['condition_in']}"


def _read_pieces(pieces: dict[str, Any]) -> ChatTemplate:
    """The template of the recipe's section `pieces`, as JSON."""
    special = {pieces["bos"], pieces["end"], *pieces["special"]}

    def parts(name: str) -> tuple[TemplatePart, ...]:
        return tuple(TemplatePart(text, text in special) for text in pieces[name])

    return ChatTemplate(
        name="pieces",
        bos=pieces["bos"],
        end_token=pieces["end"],
        header=parts("header"),
        system_header=parts("header" if pieces["system_header"] is None else "system_header"),
        after_end=parts("after_end"),
        role_names={role: pieces["roles"].get(role, role) for role in ("user", "assistant", "tool", "system")},
        addable=tuple(pieces["add"]),
        inference_condition=pieces["inference_condition"],
    )
