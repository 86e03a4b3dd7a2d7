"""Which encoding a text is read by, and that a wrong one is not guessed."""

import codecs

import pytest

from gothic_jax.text.encodings import decode, known

# Written for this test; a text of one's own is hardly shorter.
TEXTS = {
    "English": "The café was shut — the naïve young clerk, who had “nothing to declare” but his"
    " résumé, stood in the rain and read the façade’s inscription. ‘It isn’t so,’ he said.",
    "French": "Il était une fois, dans une vieille maison près de la forêt, une femme très âgée"
    " qui n’avait jamais connu la ville. « Où est passé le garçon ? » demanda-t-elle à l’été.",
    "German": "Es war einmal eine alte Frau, die in einem Häuschen am Rande des großen Waldes"
    " wohnte. Die Kinder fürchteten sich vor ihr, doch später hörten sie ihre Geschichten gern.",
    "Polish": "Dawno temu w małej chatce pod lasem żyła stara kobieta, która znała wszystkie"
    " zioła i ptaki. Dzieci bały się jej, lecz później chętnie słuchały opowieści. Łódź płynęła.",
    "Russian": "На опушке большого леса жила старая женщина, которая знала все травы и всех птиц."
    " Дети боялись её, но потом охотно слушали её рассказы до самого вечера.",
    "Greek": "Ζούσε στην άκρη του μεγάλου δάσους μια γριά γυναίκα που ήξερε όλα τα βότανα και"
    " όλα τα πουλιά. Τα παιδιά τη φοβόνταν, αλλά αργότερα άκουγαν με χαρά τις ιστορίες της.",
    "Chinese": "从前有一个老人住在大森林的边上，他认识所有的草药和所有的鸟。孩子们起初怕他，"
    "后来却喜欢听他讲故事，一直听到晚上。河水慢慢地流着，马站在水边。",
    "Taiwanese": "從前有一個老人住在大森林的邊上，他認識所有的草藥和所有的鳥。孩子們起初怕他，"
    "後來卻喜歡聽他講故事，一直聽到晚上。河水慢慢地流著，馬站在水邊。",
    "Japanese": "昔々、大きな森のはずれに一人のおばあさんが住んでいました。子供たちは初めは"
    "怖がっていましたが、やがて夕方まで話を聞くのが好きになりました。",
    "Korean": "옛날 옛적에 큰 숲 가장자리에 한 할머니가 살고 있었습니다. 아이들은 처음에는"
    " 무서워했지만 나중에는 저녁까지 이야기를 즐겨 들었습니다.",
}
UNICODE = ("utf-8", "utf-8-sig", "utf-16", "utf-32")
WITHOUT_MARK = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
LEGACY = [
    ("English", "cp1252"),
    ("French", "cp1252"),
    ("French", "mac_roman"),
    ("German", "latin-1"),
    ("Polish", "cp1250"),
    ("Polish", "iso8859-2"),
    ("Russian", "cp1251"),
    ("Russian", "koi8-r"),
    ("Russian", "iso8859-5"),
    ("Russian", "mac_cyrillic"),
    ("Greek", "cp1253"),
    ("Chinese", "gbk"),
    ("Taiwanese", "big5"),
    ("Japanese", "shift_jis"),
    ("Japanese", "euc_jp"),
    ("Korean", "euc_kr"),
]


def text_of(language: str) -> str:
    return "\n\n".join([TEXTS[language]] * 3) + "\n"


@pytest.mark.parametrize("encoding", UNICODE + WITHOUT_MARK)
@pytest.mark.parametrize("language", TEXTS)
def test_unicode_is_told_by_its_form(language: str, encoding: str) -> None:
    text = text_of(language)
    assert decode(text.encode(encoding)).text == text


@pytest.mark.parametrize(("language", "encoding"), LEGACY)
def test_a_code_page_is_detected(language: str, encoding: str) -> None:
    text = text_of(language)
    assert decode(text.encode(encoding)).text == text
    assert decode(text.encode(encoding), encoding).text == text


@pytest.mark.parametrize(
    "raw",
    [
        b"hello \xff world",
        "don’t go there".encode("mac_roman"),
        "Łódź".encode("cp1250"),
        "Привет".encode("koi8-r"),
        b"\xc7a et l\xe0\x81",
    ],
)
def test_what_is_not_sure_is_refused_with_a_cure(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"byte \d \(line 1\) is not UTF-8.*--encoding"):
        decode(raw)


@pytest.mark.parametrize(
    "text", ["The café was “shut”.", "It’s – well… À bientôt, Ça va", "ÉTÉ 1900"]
)
def test_a_few_accents_are_western_european(text: str) -> None:
    assert decode(text.encode("cp1252")) == (text, "cp1252")


@pytest.mark.parametrize("language", ["English", "French", "Russian", "Chinese"])
def test_one_bad_byte_is_one_bad_byte(language: str) -> None:
    raw = text_of(language).encode()
    place = raw.index(b"\n\n") + 1
    with pytest.raises(ValueError, match=rf"byte {place:,} \(line 2\).*damaged there.*iconv"):
        decode(raw[:place] + b"\xff" + raw[place:])


@pytest.mark.parametrize(
    ("language", "encoding"),
    [("English", "cp1252"), ("French", "latin-1"), ("Russian", "cp1251"), ("Chinese", "gbk")],
)
@pytest.mark.parametrize("utf8_first", [True, False])
def test_two_encodings_in_one_file_are_told(language: str, encoding: str, utf8_first: bool) -> None:
    text = text_of(language).replace("’", "'") if encoding == "latin-1" else text_of(language)
    parts = [text.encode(), text.encode(encoding)]
    with pytest.raises(ValueError, match="two encodings"):
        decode(b"".join(parts if utf8_first else reversed(parts)))


def test_binary_files_are_no_text() -> None:
    for raw in (b"GIF89a\0\1", bytes(range(256)), codecs.BOM_UTF16_LE + b"a", b"a word \0 more"):
        with pytest.raises(ValueError, match=r"^byte|NUL"):
            decode(raw)


def test_names_of_encodings() -> None:
    names = ("cp1252", "UTF-16", "utf-99", "base64", "a\0b")
    assert [name for name in names if known(name)] == ["cp1252", "UTF-16"]
