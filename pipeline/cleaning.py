import re
def clean_caption(text: str) -> str:
    text = text.lower().replace("<person>", "person")
    return " ".join(re.sub(r"\||www\.\S+", "", text).split())
