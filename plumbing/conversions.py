"""What to type for files that fineweb.py does not read: archives, markup, tables and pictures of pages."""
import re
import shlex
from collections import Counter
from pathlib import Path

TEXT = "pandoc -t plain --wrap none {path} -o {stem}.txt"
PANDAS = "python -c \"import pandas; pandas.{function}({path!r}).to_parquet({parquet!r})\""
COMMANDS = {  # by suffix; {path} is the file, {stem} its name without the suffix
    "zip": "unzip {path} -d {stem}", "7z": "7z x {path} -o{stem}", "rar": "unrar x {path}",
    "tar tar.gz tgz tar.bz2 tbz2 tar.xz txz tar.zst": "mkdir {stem} && tar xf {path} -C {stem}",
    "gz": "gunzip {path}", "bz2": "bunzip2 -k {path}", "xz lzma": "unxz -k {path}", "zst": "unzstd {path}",
    "lz4": "unlz4 {path}", "br": "brotli -d {path}", "z": "uncompress {path}",
    "html htm xhtml docx odt epub rtf fb2 ipynb tex rst": TEXT,
    "pdf": "pdftotext {path} {stem}.txt", "djvu": "djvutxt {path} {stem}.txt", "ps": "ps2ascii {path} {stem}.txt",
    "doc ppt pptx": "soffice --headless --convert-to txt:Text {path}",
    "xml": "python -c \"import xml.etree.ElementTree as xml; print(*xml.parse({path!r}).getroot().itertext())\""
           " > {stem}.txt",
    "md markdown text log srt vtt asc me readme": "cp {path} {stem}.txt",
    "py js ts c h cc cpp java go rs sh r yaml yml toml ini sql css": "cp {path} {path}.txt",
    "xlsx xls ods": PANDAS.replace("{function}", "read_excel"), "orc": PANDAS.replace("{function}", "read_orc"),
    "feather": PANDAS.replace("{function}", "read_feather"), "dta": PANDAS.replace("{function}", "read_stata"),
    "pkl pickle p": PANDAS.replace("{function}", "read_pickle") + ", if you trust it: a pickle can run any code",
    "h5 hdf5 hdf": PANDAS.replace("{function}", "read_hdf"),
    "sqlite sqlite3 db": "sqlite3 -csv -header {path} 'select text from TABLE' > {stem}.csv",
    "npy bin": "python train_gpt2.py --data {folder}, as these are tokens already",
    "pt pth safetensors ckpt": "python generate.py --model {path}, as it is a model",
}
BY_SUFFIX = {suffix: command for suffixes, command in COMMANDS.items() for suffix in suffixes.split()}


def suffix_of(name: str) -> str:
    """Return the suffix of a file in lower case without its dot, "tar.gz" and the like whole; "" if it has none."""
    last = Path(name).name.lower()
    double = re.search(r"\.(tar\.\w+)$", last)
    return double[1] if double else Path(last).suffix[1:]


def way_to_convert(name: str) -> str:
    """Return what to type to make a file into one that fineweb.py reads."""
    suffix = suffix_of(name)
    command = BY_SUFFIX.get(suffix)
    if not command:
        return "make it a .txt file, or a .jsonl file with one object {\"text\": ...} per line"
    path, stem = Path(name).as_posix(), Path(name).name[:-len(suffix) - 1]
    if "!r}" not in command:
        path = shlex.quote(path)
    return command.replace("{function}", "").format(
        path=path, stem=shlex.quote(stem), parquet=f"{stem}.parquet", folder=shlex.quote(str(Path(name).parent)))


def count_suffixes(names: list[str]) -> str:
    """Return "3 .md, 1 .zip" for these files, the most frequent first."""
    counts = Counter("." + suffix_of(name) if suffix_of(name) else "without a suffix" for name in names)
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(6))
