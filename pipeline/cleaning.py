def clean_caption(text: str) -> str:
    return text.lower()
