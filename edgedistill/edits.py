"""Tables changed by a request: edits of a picture, whose image and mask become conditions, and guidance by two calls."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from edgedistill.errors import ConfigError, ContractError
from edgedistill.schedule import Schedule
from edgedistill.table import Blend, Condition, Guidance, Row, SamplerTable, Stage

IMAGE, MASK = "image", "mask"
Shape = tuple[int, int, int]


def image_to_image(
    table: SamplerTable, strength: float, image_shape: Shape | None = None
) -> SamplerTable:
    """Return the tail of a table, begun from the noised image (SDEdit, arXiv:2108.01073, section 3).

    The first state is ``alpha_t*image + sigma_t*noise`` at the row whose time is nearest to `strength` times
    that of the first row.

    Args:
        table: One stage, several rows.
        strength: Above 0 and up to 1, which runs every row and keeps next to nothing of the image.
        image_shape: (channels, height, width) of images; None: of the state.

    Raises:
        ConfigError: If the strength is out of range, or the table cannot be begun at a later row; which
            and why is said.
    """
    if not 0 < strength <= 1:
        msg = f"`strength` must lie above 0 and up to 1, got {strength:g}."
        raise ConfigError(msg)
    stage, schedule, times = _timed(table, "image-to-image")
    if len(times) == 1:
        msg = "image-to-image needs a sampler of several rows; this one's only row starts from pure noise and keeps nothing of an image."
        raise ConfigError(msg)
    start = min(range(len(times)), key=lambda i: (abs(times[i] - strength * times[0]), i))
    rows = stage.rows[start:]
    for index, row in enumerate(rows):
        if len(row.next.previous) > index:
            msg = f"image-to-image at strength {strength:g} begins at row {start}, but row {start + index} looks back on rows before it (a multistep solver); use strength 1 or another sampler."
            raise ConfigError(msg)
    alpha, sigma = schedule.alpha_sigma(times[start])
    begun = dataclasses.replace(stage, rows=rows, init_noise=(sigma, 0), init_image=(alpha, IMAGE))
    return _rebuilt(table, begun, {"image_to_image": strength}, [_image(table, image_shape)])


def inpaint(table: SamplerTable, image_shape: Shape | None = None) -> SamplerTable:
    """Return a table that keeps the image where the mask is 0: every row ends with a blend.

    The known part is ``alpha_s*image + sigma_s*noise`` at the time s of the next row, and the image itself
    after the last one (arXiv:2201.09865, equation 8). Of latents, one is drawn anew where a pixel of it is.

    Args:
        table: One stage.
        image_shape: (channels, height, width) of images; None: of the state.

    Raises:
        ConfigError: If the table's rows do not tell their times; which and why is said.
    """
    stage, schedule, times = _timed(table, "inpainting")
    rows = []
    for index, row in enumerate(stage.rows):
        is_last = index == len(times) - 1
        known, noise = (1.0, 0.0) if is_last else schedule.alpha_sigma(times[index + 1])
        rows.append(
            dataclasses.replace(row, blend=Blend(known, noise, None if noise == 0 else index))
        )
    mask = Condition(MASK, "mask", shape=(1, *(image_shape or stage.shape)[1:]))
    blended = dataclasses.replace(stage, rows=tuple(rows))
    return _rebuilt(table, blended, {"inpaint": True}, [_image(table, image_shape), mask])


def edited(
    table: SamplerTable,
    given: Iterable[str],
    strength: float | None,
    image_shape: Shape | None = None,
) -> SamplerTable:
    """Return the table that a request needs.

    Args:
        table: The sampler.
        given: Names of the conditions that the caller gives.
        strength: For image-to-image; None: not asked for.
        image_shape: (channels, height, width) of images; None: of the state.

    Raises:
        ConfigError: As `image_to_image` and `inpaint`; or if an image is given and nothing says what for.
    """
    extra = set(given) & {IMAGE, MASK} - {item.name for item in table.conditions}
    if strength is not None:
        table = image_to_image(table, strength, image_shape)
    if MASK in extra:
        table = inpaint(table, image_shape)
    elif IMAGE in extra and strength is None:
        msg = "An image is given: say with `strength` how far to go from it, or with `mask` what to draw anew."
        raise ConfigError(msg)
    return table


def guided(table: SamplerTable, guidance_scale: float, null: str | None = None) -> SamplerTable:
    """Return a table of two calls per row (``cfg``) at another scale, or with another text for the unguided call.

    Args:
        table: Its guidance is ``cfg``.
        guidance_scale: g, in the range of the table's guidance.
        null: The negative prompt; None: as it is.

    Raises:
        ContractError: If the guidance is of another kind, the scale is out of range, or no text is read.
    """
    guidance, text = table.guidance, table.condition("text")
    if guidance.mode != "cfg" or (null is not None and text is None):
        msg = f"This model's guidance is {guidance.mode!r}, which takes no negative prompt; leave it out."
        raise ContractError(msg)
    low, high = guidance.range
    if not low <= guidance_scale <= high:
        msg = f"`guidance_scale` must lie in [{low:g}, {high:g}], got {guidance_scale:g}."
        raise ContractError(msg)
    nulls = guidance.null if null is None or text is None else {**guidance.null, text.name: null}
    stages = tuple(
        dataclasses.replace(stage, rows=tuple(_scaled(row, guidance_scale) for row in stage.rows))
        for stage in table.stages
    )
    chosen = dataclasses.replace(guidance, default=guidance_scale, null=nulls)
    return dataclasses.replace(table, stages=stages, guidance=chosen)


def baked(table: SamplerTable, guidance_scale: float) -> SamplerTable:
    """Return the table of networks in which this scale lies, where those of `table` take any (``embedded``).

    Args:
        table: The sampler.
        guidance_scale: g, where 1 is no guidance.

    Raises:
        ConfigError: If the guidance is of another kind, or the scale was not trained for.
    """
    guidance = table.guidance
    if guidance.mode != "embedded":
        msg = f"Guidance can be baked where it is an input of the network; this student's is {guidance.mode!r}."
        raise ConfigError(msg)
    low, high = guidance.range
    if not low <= guidance_scale <= high:
        msg = f"The guidance scale must lie in the trained range [{low:g}, {high:g}], got {guidance_scale:g}."
        raise ConfigError(msg)
    limits = (guidance_scale, guidance_scale)
    return dataclasses.replace(
        table, guidance=Guidance("baked", default=guidance_scale, range=limits)
    )


def _scaled(row: Row, guidance_scale: float) -> Row:
    return (
        row
        if row.guidance_scale is None
        else dataclasses.replace(row, guidance_scale=guidance_scale)
    )


def _timed(table: SamplerTable, what: str) -> tuple[Stage, Schedule, list[int]]:
    """Return the only stage, the schedule, and the time before each row."""
    if len(table.stages) != 1:
        msg = f"{what} is for samplers of one stage; this cascade has {len(table.stages)}."
        raise ConfigError(msg)
    if table.space.get("kind") == "latent" and table.encoder is None:
        msg = f"{what} needs the latent of an image, and this model's autoencoder came without its encoder; export the encoder too."
        raise ConfigError(msg)
    (stage,) = table.stages
    config = table.annotations.get("scheduler")
    if not isinstance(config, Mapping):
        msg = f"{what} needs alpha and sigma of each row, but the table's annotations name no `scheduler`."
        raise ConfigError(msg)
    times: list[int] = []
    for index, row in enumerate(stage.rows):
        t = _whole(row.note.get("t"))
        if t is None or (times and t > times[-1]):
            msg = f"{what} needs alpha and sigma of each row, but the note of row {index} tells no whole time that falls: {dict(row.note)}."
            raise ConfigError(msg)
        times.append(t)
    return stage, Schedule.from_config(config), times


def _whole(value: Any) -> int | None:
    return int(value) if type(value) in (int, float) and float(value).is_integer() else None


def _image(table: SamplerTable, shape: Shape | None) -> Condition:
    low, high = table.space["value_range"]
    span = (float(low), float(high))
    shape = shape or table.stages[0].shape
    return Condition(IMAGE, "image", shape=shape, value_range=span, encoder=table.encoder)


def _rebuilt(
    table: SamplerTable, stage: Stage, edit: Mapping[str, Any], conditions: Iterable[Condition]
) -> SamplerTable:
    """Number the noise anew and add the conditions."""
    edits = table.annotations.get("edits", {})
    known = {item.name: item for item in table.conditions}
    wanted = {item.name: item for item in conditions}
    if not edits and (taken := sorted(known.keys() & wanted.keys())):
        msg = f"This model's network itself takes `{taken[0]}`, so that it cannot be given for an edit."
        raise ConfigError(msg)
    numbered, count = _numbered(stage)
    return dataclasses.replace(
        table,
        stages=(numbered,),
        noise_count=count,
        conditions=tuple((known | wanted).values()),
        annotations={**table.annotations, "edits": {**edits, **edit}},
    )


def _numbered(stage: Stage) -> tuple[Stage, int]:
    count = 1
    rows: list[Row] = []
    for row in stage.rows:
        changed = row
        if row.noise is not None:
            changed = dataclasses.replace(changed, noise=count)
            count += 1
        if row.blend is not None and row.blend.index is not None:
            changed = dataclasses.replace(
                changed, blend=dataclasses.replace(row.blend, index=count)
            )
            count += 1
        rows.append(changed)
    return dataclasses.replace(stage, init_noise=(stage.init_noise[0], 0), rows=tuple(rows)), count
