"""Recognise how answers begin that refuse to describe a picture, or that say there is none, in many languages."""

import re
from collections.abc import Mapping, Sequence

# what a model does not do, where it refuses
DOES = (
    r"(?:see|view|assist|help|describe|identify|provide|access|analy[sz]e|generate|create|fulfil|caption|process"
    r"|interpret|determine|recogni[sz]e|open|display|continue|do (?:that|this)|answer|discuss|engage|comment|produce"
    r"|share|make|give|comply|offer|complete|directly|tell|read|write|look)"
)
PICTURE = r"(?:image|picture|photo|photograph|attachment|file)"
WHAT = rf"(?:{PICTURE}|content|request|prompt|response|input)"

REFUSALS: Mapping[str, Sequence[str]] = {
    "en": (
        r"(?:i['’]?m|i am) (?:really |very |so )?sorry\s*(?:[,.;:!—–-]|but\b|i\b|for (?:any|the conf|the inc)|$)"
        r"(?!\s*(?:[\"”]|we\b|mom|dad|mum))",
        r"(?:sorry|(?:my )?apologies),? (?:but )?(?:i (?:can|could|am (?:not|un)|won|do|don)|i['’]m (?:not|un))",
        r"we['’]?(?:re| are) sorry,? but (?:we (?:can|could|are (?:not|un))|this |the |your )",
        r"i apologi[sz]e\b",
        rf"(?:unfortunately,? )?i (?:can(?:['’]?t| ?not)|could ?n['’]?t|won['’]?t|will not) (?:\w+ly )?{DOES}\b",
        r"(?:unfortunately,? )?(?:i am|i['’]m) (?:not able|unable|not comfortable|uncomfortable|not allowed)\b",
        r"i do(?:n['’]?t| not) (?:feel comfortable|(?:currently )?have (?:access|the (?:ability|capabilit|capacit)))",
        r"i (?:must|have to|need to) (?:respectfully |politely )?(?:decline|refuse)\b|i['’]d (?:rather|prefer) not\b",
        r"as an? (?:ai\b(?![ -](?:art|image|render|generat))|artificial intelligence|(?:large )?language model"
        r"|vision\b)",
        r"(?:i['’]?m|i am) (?:just |only |currently )?an? (?:ai (?:language |assistant|model|and\b|,)"
        r"|(?:large )?language model|text-based)",
        r"it (?:is|would be|['’]s) (?:not appropriate|inappropriate) (?:for me )?to\b",
        rf"(?:this|the|your) {WHAT}(?: you (?:provided|sent|shared|uploaded))? (?:may |might )?"
        r"(?:violates?|goes against) (?:\w+['’]?s? ){0,3}?(?:content|usage|safety|community|polic|guideline|terms)",
        rf"(?:this|the|your) {WHAT} (?:was|has been|is|were) (?:flagged|filtered|rejected|blocked) "
        r"(?:due|as|by|because)",
        rf"(?:this|the|your) {WHAT}(?: you (?:provided|sent|shared|uploaded))? contains? [^.]{{0,60}}"
        r"\bi (?:can['’]?t|cannot|am (?:not|un))",
    ),
    "de": (
        r"(?:es tut mir (?:sehr )?leid|tut mir leid|entschuldigung|verzeihung|sorry),? (?:aber |ich\b|da|dies)",
        r"(?:leider )?kann ich (?:leider )?(?:nicht|keine)\b|leider (?:kann|darf|bin|ist es) (?:ich|mir)\b",
        r"ich kann (?:leider )?(?:nicht|keine|dabei)\b",
        r"ich (?:kann|darf|möchte|werde) (?:[\w-]+ ){1,6}nicht (?:beschreiben|helfen|identifizieren|beantworten|sehen)",
        r"ich bin (?:leider )?nicht in der lage\b",
        r"als (?:ki\b(?![ -](?:gener|kunst|bild))|künstliche intelligenz|(?:großes )?sprachmodell)",
    ),
    "fr": (
        r"(?:je suis )?désolée?,? (?:mais )?(?:je|cette|il)\b",
        r"(?:malheureusement|je regrette),? (?:mais )?je (?:ne\b|n['’])|je ne (?:peux|suis) pas\b",
        r"en tant qu(?:['’]|e )(?:une? )?(?:ia\b|modèle|assistant|intelligence)",
        r"je n['’]ai pas (?:accès|la (?:cap|poss))",
    ),
    "es": (
        r"(?:lo siento|lamentablemente|desafortunadamente|disculpa|perdón),? (?:pero\b|(?:yo )?no\b)|lamento no\b",
        r"no puedo (?:ayudar|describir|identificar|ver|proporcionar)\b|no tengo (?:acceso|la capacidad)\b",
        r"como (?:una? )?(?:ia\b|modelo de (?:lenguaje|ia)|inteligencia artificial|asistente (?:de|virtual))",
    ),
    "pt": (
        r"(?:me )?desculpe,? (?:mas\b|não\b)|(?:sinto muito|infelizmente|lamento),? (?:mas )?(?:eu )?não\b",
        r"não (?:posso|consigo) (?:ajudar|descrever|identificar|fornecer)\b",
        r"como (?:uma? )?(?:ia\b|modelo de linguagem|inteligência artificial|assistente (?:de|virtual))",
    ),
    "it": (
        r"(?:mi dispiace|sono spiacente|spiacente|purtroppo|mi scuso),? (?:ma\b|(?:io )?non\b)",
        r"non posso (?:aiutar|descrivere|identificare|vedere|fornire)",
        r"come (?:un['’]? ?)?(?:ia\b|modello (?:linguistico|di linguaggio)|intelligenza artificiale)",
    ),
    "ru": (
        r"(?:извините|простите|к сожалению),? (?:но )?(?:я|мне|описать|это изобр)",
        r"я не могу\b|как (?:ии\b|(?:большая )?языковая модель|искусственный интеллект)",
    ),
    "nl": (
        r"(?:het spijt (?:me|mij)|sorry|helaas),? (?:maar )?(?:ik|kan ik)\b",
        r"als (?:ai\b|(?:een )?(?:groot )?taalmodel)",
        r"ik kan (?:deze|dit|geen|u|je) (?:[\w-]+ ){0,4}(?:niet|helpen|beschrijven)",
    ),
    "pl": (r"(?:przepraszam|przykro mi|niestety),? (?:ale )?nie\b|jako (?:model językowy|sztuczna inteligencja|si\b)",),
    "tr": (r"(?:üzgünüm|maalesef|özür dilerim),?[^.]{0,60}(?:amam|emem|amıyorum|emiyorum)\b",),
    "vi": (r"(?:rất tiếc|xin lỗi),? (?:nhưng )?(?:tôi|mình) (?:không|chưa)",),
    "id": (r"maaf,? (?:tapi |tetapi |namun )?saya tidak\b",),
    "ar": (r"(?:عذر[اًا]+|آسف|أعتذر|للأسف)[،,]?\s*[^.]{0,20}لا\b",),
    "hi": (r"(?:मुझे खेद है|क्षमा करें|माफ़ करें|माफ कीजिए)",),
    "zh": (
        r"(?:非常|很|十分|真的)?(?:抱歉|对不起|對不起|遗憾)[，,！!]?[^。\n“”\"]{0,20}?(?:无法|無法|不能|没有|沒有|不会|不便)",
        r"(?:很?抱歉|对不起|對不起)[，,]? *(?:但|但是)?我(?!爱|愛)",
        r"我(?:无法|無法|不能|不可以|不便|没有办法)(?:看到|查看|描述|识别|識別|提供|协助|協助|帮助|幫助|处理|回答|满足|分析|确定)",
        r"作[为為](?:一个|一個|一名|一款)?(?:人工智能|ai(?!艺术|藝術|绘|繪|生成|作品)|(?:大型?)?语言模型|智能)",
    ),
    "ja": (
        r"(?<![「『])申し訳(?:ありません|ございません)",
        r"(?<![「『])(?:すみません(?:が|、)|ごめんなさい[、。]|恐れ入りますが|残念ながら)[^。「」]{0,60}(?:ません|でき(?:ない|ず))",
        r"ai(?:言語モデル|アシスタント|モデル)?(?:として|なので|である)、?",
        r"(?:この|その|こちらの)?(?:画像|写真)[^。「」]{0,20}(?:説明|特定|識別|描写)[^。「」]{0,8}でき(?:ません|かねます)",
    ),
    "ko": (
        r"(?<![\"“'])죄송(?:합니다|하지만|합니다만)",
        r"ai ?(?:언어 ?모델|어시스턴트|모델)(?:로서|이기|이므로|이라)",
        r"저는 [^.]{0,30}(?:볼|설명할|식별할|도와드릴) 수 없",
    ),
}

NO_IMAGES: Mapping[str, Sequence[str]] = {
    "en": (
        rf"i (?:do ?n['’]?o?t|can(?:['’]?t| ?not)|am not able to) (?:currently |actually )?(?:see|find|have) "
        rf"(?:any |an? |the )?{PICTURE}s?\b(?! in the mirror)",
        rf"(?:i['’]m|i am) unable to (?:see|view|find|open|load) (?:any |an? |the |your ){PICTURE}s?\b",
        rf"(?:it (?:seems|appears|looks like) (?:that )?)?(?:there (?:is|was|seems to be|appears to be) |there['’]s )?"
        rf"no {PICTURE} (?:was|is|has been|seems|appears)? ?(?:to be )?(?:been )?"
        r"(?:attached|provided|uploaded|shared|included|given|found|detected|received)\b"
        r"(?=\W*(?:$|please|could|can|to\b|in your|with your|yet|for me|here|so))",
        r"(?:it )?(?:looks|seems|appears) (?:like|that|as if|as though) (?:no |the |an |your |you\b)[^.]{0,40}"
        r"(?:attach|provid|upload|load|shar|includ|display|come through)",
        r"you (?:haven['’]t|have not|didn['’]t|did not) (?:\w+ )?(?:attach|provid|upload|shar|includ)",
        rf"(?:the|your|this) {PICTURE} (?:(?:did not|didn['’]t|failed to|does not|doesn['’]t) (?:load|upload|display"
        r"|open|come through)|(?:could not|couldn['’]t|cannot|can['’]t) be (?:load|upload|display|process|open"
        r"|found|read)"
        r"|(?:appears|seems) to be (?:blank or|missing|corrupt))",
        rf"error\b[^.\n]{{0,20}}:[^.\n]{{0,60}}\b{WHAT}\b",
        r"(?:i['’]m|i am) ready to (?:describe|caption|help|analy)",
        rf"i(?:['’]ll)? need (?:you to|(?:the|an?) {PICTURE}\b)",
        r"(?:please|could you (?:please )?|can you (?:please )?) ?(?:re-?)?(?:upload|provide|share|attach|send) "
        r"(?:me )?(?:the|an|your|a)\b",
    ),
    "de": (
        r"ich (?:sehe|kann) (?:leider )?kein(?:e|en)? (?:bild|foto)",
        r"es (?:wurde|ist) (?:leider )?kein bild (?:angehängt|hochgeladen|vorhanden|beigefügt)",
        r"bitte (?:laden sie|lade) [^.]{0,20}(?:bild|foto)",
    ),
    "fr": (
        r"je ne vois (?:pas|aucune) (?:d['’])?(?:image|photo)|aucune image (?:n['’]a été|jointe|fournie)",
        r"veuillez (?:télécharger|fournir|joindre|partager)",
        r"pourriez-vous [^.?]{0,20}(?:partager|fournir|joindre|envoyer)",
    ),
    "es": (
        r"no veo (?:ninguna|la) (?:imagen|foto)|no (?:hay|se ha|has|ha) [^.]{0,30}(?:imagen|foto)[^.]{0,10}"
        r"(?:adjunt|proporcion|cargad|subid)",
        r"por favor,? (?:sube|suba|proporcion[ae]|adjunt[ae]|comparte|env[ií][ae])",
    ),
    "pt": (r"não (?:vejo|consigo ver) (?:nenhuma|a) (?:imagem|foto)|nenhuma imagem (?:foi|anexada|enviada)",),
    "it": (r"non vedo (?:alcuna|nessuna) (?:immagine|foto)|nessuna immagine (?:è stata|allegata|fornita)",),
    "ru": (r"я не вижу (?:никакого )?(?:изображени|картинк|фото)|пожалуйста,? (?:загрузите|прикрепите|отправьте)",),
    "zh": (
        r"(?:我|您|你)?(?:似乎|好像)?(?:还)?(?:没有|沒有|未能?|无法|無法|看不到)"
        r"(?:看到|收到|查看|检测到|檢測到|上传|上傳|提供|附上)?(?:任何|您上传的|你上传的)?(?:图片|圖片|图像|圖像|照片)",
        r"请(?:您)?(?:上传|提供|发送|重新上传)[^。]{0,10}(?:图|照)",
    ),
    "ja": (
        r"画像(?:が|は)(?:見え|見当たり|添付されてい|提供されてい|表示されてい|アップロードされてい)ませ",
        r"画像を(?:アップロード|添付|提供|送信|送って|お送り|共有)(?:して|ください|くだ)?",
    ),
    "ko": (r"이미지(?:가|를) (?:보이지|첨부되지|제공되지|찾을 수|볼 수|업로드해|첨부해|제공해)",),
}

SORRY = r"(?:(?:(?:i['’]?m|i am) (?:\w+ )?sorry|sorry|i apologi[sz]e|unfortunately)[,.]?\s*)?(?:but\s+)?"


def _beginnings(rules: Mapping[str, Sequence[str]], before: str = "") -> re.Pattern[str]:
    every = "|".join(pattern for patterns in rules.values() for pattern in patterns)
    return re.compile(rf"\W*{before}(?:{every})", re.IGNORECASE)


REFUSAL = _beginnings(REFUSALS)
NO_IMAGE = _beginnings(NO_IMAGES, SORRY)
