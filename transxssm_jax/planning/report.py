"""What is known of a planned step, as plain values and as text."""

import re

import jax

from pallas_kernels.chips import CHIPS, Chip, Tpu
from transxssm_jax.config import Config
from transxssm_jax.model import costs, parameters
from transxssm_jax.parallel import mesh
from transxssm_jax.planning import estimate, plan_search, roofline
from transxssm_jax.planning.topology import GIB, Compiled, DoesNotFitError, Topology
from transxssm_jax.training.gradient import reduction_dtypes


def report(config: Config, topology: Topology) -> dict:
    """What is known without the compiler, as plain values: bounds from below, and the estimate beside them."""
    chip, sizes = topology.chip, mesh.axis_sizes(config, topology.num_devices)
    tokens = config.tokens_per_step / topology.num_devices
    attended = costs.row_attended(config.data.seq_len)
    comm, dtypes = roofline.min_comm_bytes(config, sizes), reduction_dtypes(config, sizes)
    memory = {name: int(size) for name, size in roofline.min_memory_bytes(config, sizes).items()}
    result = dict(
        topology=topology.name,
        slices=topology.slices,
        devices=topology.num_devices,
        mesh=sizes,
        compiled=False,
        scan=config.model.ssd_implementation,
        attention=config.model.attention_implementation,
        parameters=parameters.count_params(config.model),
        tokens_per_step=config.tokens_per_step,
        model_flops=tokens * costs.train_flops_per_token(config.model, attended),
        executed_flops=tokens * roofline.executed_flops_per_token(config, sizes),
        hbm_bytes=roofline.min_hbm_bytes(config, sizes),
        usable_bytes=chip.usable,
        min_memory_bytes=memory,
        expected_memory_bytes=estimate.expected_memory_bytes(config, sizes, chip),
        min_comm_bytes=comm,
        gradient_dtypes=dtypes,
        gradient_bytes=roofline.gradient_bytes(config, sizes),
        gradient_bytes_in={
            dtype: roofline.gradient_bytes(config, sizes, dict.fromkeys(dtypes, dtype))
            for dtype in ('bfloat16', 'float32')
        },
        fits=sum(memory.values()) <= chip.usable,
    )
    network = {'links': sum(comm.values()) / roofline.all_links(chip)}
    if topology.slices > 1:
        network['DCN'] = roofline.min_dcn_bytes(config, sizes) / chip.dcn
    if result['expected_memory_bytes'] > chip.usable:
        result['nearest'] = _nearest(config, chip, sizes)
    return _with_times(result, config, chip, network)


def compiled_report(config: Config, topology: Topology, device_mesh: jax.sharding.Mesh, compiled: Compiled) -> dict:
    """The same, with what the compiler made of it."""
    chip, collectives = topology.chip, compiled.collectives
    result = report(config, topology) | dict(
        compiled=True,
        compile_seconds=compiled.seconds,
        argument_bytes=compiled.arguments,
        temporary_bytes=compiled.temporaries,
        peak_bytes=compiled.peak,
        fits=True,
        kernels=compiled.kernels,
        hbm_bytes=compiled.hbm_bytes,
        loops_without_trips=compiled.loops_without_trips,
        collectives=_table(chip, device_mesh, collectives),
        comm_bytes=sum(c.runs * c.comm_bytes for c in collectives),
    )
    result.pop('nearest', None)  # it was of the computed memory
    return _with_times(result, config, chip, roofline.network_seconds(chip, device_mesh.devices, collectives))


def refused_report(config: Config, topology: Topology, error: DoesNotFitError) -> dict:
    """The report of a step that the compiler refused: its message, the largest temporaries, the nearest that fits."""
    result, needed = report(config, topology), 1.01 * topology.chip.usable
    if used := re.search(r'Used ([\d.]+)([MG]) of|\(([\d.]+)([MG])\) exceeds available', str(error)):
        size, unit = used[1] or used[3], used[2] or used[4]
        needed = max(needed, float(size) * {'M': 2**20, 'G': GIB}[unit])
    # The computed memory is not the compiler's; the refused step shows by how much they differ.
    scale = needed / result['expected_memory_bytes']
    nearest = _nearest(config, topology.chip, result['mesh'], scale)
    return result | dict(fits=False, message=str(error), largest=error.largest, nearest=nearest)


def _nearest(config, chip, sizes, scale=1.0):
    """The overrides of the nearest setting that fits, and what is expected of it; {} where nothing fits."""

    def needs(tried, sizes):
        return scale * estimate.expected_memory_bytes(tried, sizes, chip)

    found = plan_search.nearest_that_fits(config, chip, sizes, needs)
    if not found:
        return {}
    return dict(overrides=found.overrides, expected_memory_bytes=found.memory, expected_seconds=found.seconds)


def _with_times(result: dict, config: Config, chip: Chip, network: dict[str, float]) -> dict:
    seconds = {'compute': result['executed_flops'] / chip.peak, 'HBM': result['hbm_bytes'] / chip.bandwidth, **network}
    bound = max(seconds.values())
    hbm_bytes = result['hbm_bytes'] if result['compiled'] else 0.0
    parts = estimate.expected_seconds(config, result['mesh'], chip, sum(network.values()), hbm_bytes)
    expected = sum(parts.values())
    return result | dict(
        seconds=seconds,
        bound_seconds=bound,
        bound_by=max(seconds, key=seconds.get),
        bound_mfu=result['model_flops'] / chip.peak / bound,
        bound_tokens_per_second=result['tokens_per_step'] / bound,
        expected_by=parts,
        expected_seconds=expected,
        expected_mfu=result['model_flops'] / chip.peak / expected,
        expected_tokens_per_second=result['tokens_per_step'] / expected,
        expected_from=estimate.source(chip),
    )


def _table(chip, device_mesh, collectives):
    """Rows: collectives of one kind, axis and dtype together, the longest first."""
    rows = {}
    for c in collectives:
        key = (c.kind, '+'.join(c.axes(dict(device_mesh.shape))), c.arrays[0][0])
        row = rows.setdefault(key, dict(kind=key[0], axis=key[1], dtype=key[2], count=0, bytes=0.0, seconds=0.0))
        row['count'] += c.runs
        row['bytes'] += c.runs * c.comm_bytes
        row['seconds'] += roofline.collective_seconds(chip, device_mesh.devices, c)
    return sorted(rows.values(), key=lambda row: -row['seconds'])


def show(result: dict) -> str:
    """The report as text."""

    def gib(size):
        return f'{size / GIB:.2f} GiB'

    axes = ' x '.join(f'{name} {size}' for name, size in result['mesh'].items() if size > 1) or 'one device'
    lines = [
        f'{result["topology"]}{f" x {result['slices']} slices" if result["slices"] > 1 else ""}: '
        f'{result["devices"]} devices, {axes}',
        f'parameters      {result["parameters"]:,}',
        f'tokens per step {result["tokens_per_step"]:,}',
        f'kernels         {_show_kernels(result)}',
    ]
    memory = ', '.join(f'{name} {gib(size)}' for name, size in result['min_memory_bytes'].items())
    if result['compiled']:
        lines += [
            f'compiled in     {result["compile_seconds"]:.0f} s',
            f'memory needed   {gib(result["peak_bytes"])} of {gib(result["usable_bytes"])} per device: arguments '
            f'{gib(result["argument_bytes"])}, temporaries {gib(result["temporary_bytes"])}, not all at a time',
            f'  lower bound   {memory}',
        ]
    else:
        lines += [
            'not compiled    all below is computed; memory, bytes and times are lower bounds unless marked as expected',
            f'memory needed   at least {gib(sum(result["min_memory_bytes"].values()))} of {gib(result["usable_bytes"])} '
            f'per device: {memory}',
            f'  expected      {gib(result["expected_memory_bytes"])}',
        ]
    least = result['min_comm_bytes']
    lines.append(
        'communication   at least '
        + f'{sum(least.values()) / 1e6:,.0f} MB sent per device: '
        + ', '.join(f'{name} {size / 1e6:,.0f}' for name, size in least.items() if size)
    )
    if result['gradient_bytes']:
        lines.append(_show_gradients(result))
    if result['compiled']:
        ratio = result['comm_bytes'] / sum(least.values()) if any(least.values()) else 1.0
        lines.append(f'  compiled      {result["comm_bytes"] / 1e6:,.0f} MB, {ratio:.2f} of the least')
        lines.append(f'  {"collective":19}{"axis":20}{"dtype":7}{"count":>7}{"MB":>11}{"ms":>9}')
        lines += [
            f'  {row["kind"]:19}{row["axis"]:20}{row["dtype"]:7}{row["count"]:7}{row["bytes"] / 1e6:11,.1f}'
            f'{1e3 * row["seconds"]:9.2f}'
            for row in result['collectives']
        ]
        if result['loops_without_trips']:
            lines.append(f'  {result["loops_without_trips"]} loops whose trips are not known count as one')

    def milliseconds(seconds):
        return ', '.join(f'{name} {1e3 * s:.0f} ms' for name, s in seconds.items() if s)

    lines += [
        f'TFLOP           {result["model_flops"] / 1e12:.2f} per device where one document fills every row; with what is '
        f'computed again {result["executed_flops"] / 1e12:.2f}',
        f'HBM traffic     {result["hbm_bytes"] / 1e9:.1f} GB per device',
        f'lower bounds    {milliseconds(result["seconds"])}',
        f'bound           no step can take less than {1e3 * result["bound_seconds"]:.0f} ms ({result["bound_by"]}): below '
        f'{result["bound_tokens_per_second"]:,.0f} tokens/s and {100 * result["bound_mfu"]:.0f}% MFU',
        f'expected        {1e3 * result["expected_seconds"]:.0f} ms per step, {result["expected_tokens_per_second"]:,.0f} '
        f'tokens/s, {100 * result["expected_mfu"]:.0f}% MFU ({result["expected_from"]})',
        f'  sum of        {milliseconds(result["expected_by"])}',
    ]
    if 'message' in result:
        lines += [f'the compiler    {result["message"]}', 'largest temporaries:', *result['largest']]
    if 'nearest' in result and not result['compiled']:
        lines.append(_show_nearest(result['nearest']))
    lines.append(_verdict(result))
    return '\n'.join(lines)


def _show_gradients(result: dict) -> str:
    """The gradients' share of the communication, and what it would be in each dtype: the price of train.gradient_dtype_*."""
    axes = [axis for axis, size in result['mesh'].items() if size > 1]
    used = ', '.join(f'{axis} in {result["gradient_dtypes"][axis]}' for axis in axes)
    total = {dtype: sum(sizes.values()) / 1e6 for dtype, sizes in result['gradient_bytes_in'].items()}
    return (
        f'  gradients     {sum(result["gradient_bytes"].values()) / 1e6:,.0f} MB of it, summed over {used}; over all axes in '
        + ', '.join(f'{dtype} {size:,.0f}' for dtype, size in total.items())
    )


def _verdict(result: dict) -> str:
    if not result['fits']:
        return 'it does not fit'
    if result['compiled']:
        return 'it fits'
    expected = result['expected_memory_bytes'] <= result['usable_bytes']
    return 'it may fit' if expected else 'it may fit by the lower bound, but it is not expected to'


def _show_kernels(result: dict) -> str:
    if not result['compiled']:
        return f'scan {result["scan"]}, attention {result["attention"]}'
    return ', '.join(f'{runs} {name}' for name, runs in result['kernels'].items()) or 'none of Pallas'


def _show_nearest(nearest: dict) -> str:
    if not nearest:
        return 'no fit          with any remat, accumulation_steps or fsdp; take a larger --topology, or try --search'
    return (
        f'nearest fit     {nearest["overrides"]}: expected {nearest["expected_memory_bytes"] / GIB:.2f} GiB per device and '
        f'{1e3 * nearest["expected_seconds"]:.0f} ms per step (computed, not compiled)'
    )


def show_chips() -> str:
    """The table of chips: one device per row."""
    head = f'{"chip":10}{"bf16":>9}{"HBM":>9}{"usable":>9}{"HBM":>9}{"link":>9}{"DCN":>9}{"per host":>10}'
    units = f'{"":10}{"TFLOP/s":>9}{"GiB":>9}{"GiB":>9}{"GB/s":>9}{"GB/s":>9}{"GB/s":>9}{"devices":>10}'
    rows = [
        f'{name:10}{c.peak / 1e12:9.1f}{c.hbm / GIB:9.1f}{c.usable / GIB:9.2f}{c.bandwidth / 1e9:9.0f}'
        f'{(c.link if isinstance(c, Tpu) else c.nvlink) / 1e9:9.0f}{c.dcn / 1e9:9.2f}{c.host_devices:10}'
        for name, c in CHIPS.items()
    ]
    return '\n'.join(
        [
            head,
            units,
            *rows,
            'link: one ICI link, one way; GPUs: all of NVLink, one way. Sources: pallas_kernels/chips.py',
        ]
    )
