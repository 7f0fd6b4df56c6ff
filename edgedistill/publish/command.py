"""`edgedistill card`, `push` and `pull`: read the command line, call, print."""

import argparse
import json
from pathlib import Path
from typing import Any

from edgedistill.arguments import add_command, add_json
from edgedistill.errors import ConfigError
from edgedistill.files import read_json, write_bytes

_CARD_EPILOG = """\
examples:
  edgedistill card bundle                                  # writes bundle/README.md
  edgedistill parity bundle --json > parity.json
  edgedistill card bundle --parity parity.json -o -        # to stdout
"""
_PUSH_EPILOG = """\
examples:
  edgedistill card bundle --parity parity.json
  edgedistill push bundle USER/NAME --private

Needs the network and a token that may write (`huggingface-cli login`). Nothing else of edgedistill uses the network.
"""
_PULL_EPILOG = """\
examples:
  edgedistill pull USER/NAME bundle
  edgedistill pull USER/NAME bundle --revision v1 --overwrite

The folder appears when every hash holds. Needs the network.
"""


def register_card(commands: Any) -> None:
    """Add `edgedistill card`."""
    short = "write a model card from the manifest"
    text = "Write a bundle's model card: samplers, networks, sizes, parity and where it comes from."
    parser = add_command(commands, "card", short, text, _CARD_EPILOG)
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder that `export` made")
    parser.add_argument("--parity", metavar="JSON", type=Path, help="what `parity --json` printed")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="file to write, or - for stdout (default: BUNDLE/README.md)",
    )
    add_json(parser)
    parser.set_defaults(run=_card)


def register_push(commands: Any) -> None:
    """Add `edgedistill push`."""
    short = "upload a bundle to the Hugging Face hub"
    parser = add_command(
        commands, "push", short, "Upload a bundle as one commit, with its card.", _PUSH_EPILOG
    )
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder that `export` made")
    parser.add_argument("repository", metavar="USER/NAME", help="made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    _add_revision(parser, "a branch, made if it is not there (default: main)")
    parser.set_defaults(run=_push)


def register_pull(commands: Any) -> None:
    """Add `edgedistill pull`."""
    short = "download a bundle from the Hugging Face hub"
    parser = add_command(commands, "pull", short, "Download a bundle and verify it.", _PULL_EPILOG)
    parser.add_argument("repository", metavar="USER/NAME", help="where it lies")
    parser.add_argument("target", metavar="BUNDLE", type=Path, help="folder to make")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a BUNDLE, whatever it holds"
    )
    _add_revision(parser, "a branch, tag or commit (default: main)")
    parser.set_defaults(run=_pull)


def _add_revision(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--revision", metavar="NAME", help=text)
    add_json(parser)


def _card(options: argparse.Namespace) -> int:
    from edgedistill.bundle import Bundle
    from edgedistill.publish.card import FILE, render

    if options.json and options.output == Path("-"):
        msg = "-o -: prints the card itself; leave --json out, or name a file."
        raise ConfigError(msg)
    parity = None if options.parity is None else read_json(options.parity)
    if parity is not None and not isinstance(parity, dict):
        msg = f"{options.parity}: not a parity report; make one with `edgedistill parity BUNDLE --json`."
        raise ConfigError(msg)
    text = render(Bundle.open(options.bundle), parity)
    if options.output == Path("-"):
        print(text, end="")
        return 0
    target = options.output or options.bundle / FILE
    write_bytes(target, text.encode())
    print(json.dumps({"card": str(target)}) if options.json else f"Written: {target}")
    return 0


def _push(options: argparse.Namespace) -> int:
    from edgedistill.publish.hub import push

    where = push(
        options.bundle, options.repository, private=options.private, revision=options.revision
    )
    print(json.dumps({"url": where}) if options.json else f"Uploaded: {where}")
    return 0


def _pull(options: argparse.Namespace) -> int:
    from edgedistill.publish.hub import pull

    bundle = pull(
        options.repository,
        options.target,
        revision=options.revision,
        overwrite=options.overwrite,
    )
    told = {"bundle": str(bundle.root), "name": bundle.name, "fingerprint": bundle.fingerprint}
    print(json.dumps(told) if options.json else f"Written: {bundle.root} ({bundle.name})")
    return 0
