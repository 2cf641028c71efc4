"""The default prompts of captioners. Imports no torch: a caption from a server needs none."""

_CHAT = {
    "alt": "Write the alternative text of this image: one sentence that says what it shows.",
    "short": "Describe this image in one short sentence.",
    "long": "Describe this image in one paragraph: its subjects, what they do, the setting, colours, light, style and "
    "composition, and any text in it. Say only what can be seen. Do not begin with 'The image'.",
    "tags": "List what this image shows as short tags, separated by commas, the most important ones first.",
}


# what Florence-2's own processor makes of <CAPTION> and <MORE_DETAILED_CAPTION>
_FLORENCE = {
    "alt": "What does the image describe?",
    "short": "What does the image describe?",
    "long": "Describe with a paragraph what is shown in the image.",
}


def default_prompt(kind: str, family: str = "chat") -> str:
    """Give the prompt for a kind (`alt`, `short`, `long`, `tags`) and a family of `captioners`, or any chat model.

    That of a BLIP is empty: a prompt would be the beginning of its caption.

    Raises:
        ValueError: the family cannot be asked for this kind.
    """
    if family == "blip":
        return ""
    prompts = _FLORENCE if family == "florence2" else _CHAT
    if kind not in prompts:
        raise ValueError(f"kind {kind!r}: {family} has no prompt for it; take another captioner, or give a prompt")
    return prompts[kind]
