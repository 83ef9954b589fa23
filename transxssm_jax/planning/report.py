"""What is known of a planned step, as plain values and as text."""

import jax

from pallas_kernels.chips import CHIPS, Chip, Tpu
from transxssm_jax.config import Config
from transxssm_jax.model import costs, parameters
from transxssm_jax.parallel import mesh
from transxssm_jax.planning import roofline
from transxssm_jax.planning.topology import GIB, Compiled, Topology


def report(config: Config, topology: Topology) -> dict:
    """What is known without the compiler, as plain values, all of them bounds from below."""
    chip, sizes = topology.chip, mesh.axis_sizes(config, topology.num_devices)
    tokens = config.tokens_per_step / topology.num_devices
    model_flops = tokens * costs.train_flops_per_token(config.model, config.data.seq_len)
    executed = tokens * roofline.executed_flops_per_token(config, sizes)
    wire = roofline.least_wire_bytes(config, sizes)
    memory = {name: int(size) for name, size in roofline.least_memory(config, sizes).items()}
    hbm_bytes = roofline.least_hbm_bytes(config, sizes)
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
        model_flops=model_flops,
        executed_flops=executed,
        hbm_bytes=hbm_bytes,
        usable_bytes=chip.usable,
        least_memory_bytes=memory,
        least_wire_bytes=wire,
        fits=sum(memory.values()) <= chip.usable,
    )
    network = {'links': sum(wire.values()) / roofline.all_links(chip)}
    if topology.slices > 1:
        network['DCN'] = roofline.least_dcn_bytes(config, sizes) / chip.dcn
    return _with_times(result, chip, network)


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
        hbm_bytes=compiled.hbm_bytes,
        loops_without_trips=compiled.loops_without_trips,
        collectives=_table(chip, device_mesh, collectives),
        wire_bytes=sum(c.runs * c.wire_bytes for c in collectives),
    )
    return _with_times(result, chip, roofline.network_seconds(chip, device_mesh.devices, collectives))


def _with_times(result: dict, chip: Chip, network: dict[str, float]) -> dict:
    seconds = {'compute': result['executed_flops'] / chip.peak, 'HBM': result['hbm_bytes'] / chip.bandwidth, **network}
    bound = max(seconds.values())
    return result | dict(
        seconds=seconds,
        bound_seconds=bound,
        bound_by=max(seconds, key=seconds.get),
        mfu=result['model_flops'] / chip.peak / bound,
        tokens_per_second=result['tokens_per_step'] / bound,
    )


def _table(chip, device_mesh, collectives):
    """Rows of collectives of a kind, axis and dtype together, the longest first."""
    rows = {}
    for c in collectives:
        key = (c.kind, '+'.join(c.axes(dict(device_mesh.shape))), c.arrays[0][0])
        row = rows.setdefault(key, dict(kind=key[0], axis=key[1], dtype=key[2], count=0, bytes=0.0, seconds=0.0))
        row['count'] += c.runs
        row['bytes'] += c.runs * c.wire_bytes
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
        f'tokens a step   {result["tokens_per_step"]:,}',
        f'kernels         scan {result["scan"]}, attention {result["attention"]}',
    ]
    memory = ', '.join(f'{name} {gib(size)}' for name, size in result['least_memory_bytes'].items())
    if result['compiled']:
        lines += [
            f'compiled in     {result["compile_seconds"]:.0f} s',
            f'a device needs  {gib(result["peak_bytes"])} of {gib(result["usable_bytes"])}: arguments '
            f'{gib(result["argument_bytes"])}, temporaries {gib(result["temporary_bytes"])}, not all at a time',
            f'  computed      {memory}',
        ]
    else:
        lines += [
            'not compiled    all below is computed, and a bound from below',
            f'a device needs  {gib(sum(result["least_memory_bytes"].values()))} of {gib(result["usable_bytes"])}: {memory}',
        ]
    least = result['least_wire_bytes']
    lines.append(
        'sent a device   least '
        + f'{sum(least.values()) / 1e6:,.0f} MB: '
        + ', '.join(f'{name} {size / 1e6:,.0f}' for name, size in least.items() if size)
    )
    if result['compiled']:
        ratio = result['wire_bytes'] / sum(least.values()) if any(least.values()) else 1.0
        lines.append(f'  compiled      {result["wire_bytes"] / 1e6:,.0f} MB, {ratio:.2f} of the least')
        lines.append(f'  {"collective":19}{"axis":20}{"dtype":7}{"count":>7}{"MB":>11}{"ms":>9}')
        lines += [
            f'  {row["kind"]:19}{row["axis"]:20}{row["dtype"]:7}{row["count"]:7}{row["bytes"] / 1e6:11,.1f}'
            f'{1e3 * row["seconds"]:9.2f}'
            for row in result['collectives']
        ]
        if result['loops_without_trips']:
            lines.append(f'  {result["loops_without_trips"]} loops whose trips are not known count as one')
    lines += [
        f'TFLOP a device  {result["model_flops"] / 1e12:.2f}; with what is computed again '
        f'{result["executed_flops"] / 1e12:.2f}',
        f'HBM a device    {result["hbm_bytes"] / 1e9:.1f} GB',
        'lower bounds    ' + ', '.join(f'{name} {1e3 * s:.0f} ms' for name, s in result['seconds'].items()),
        f'at best         {1e3 * result["bound_seconds"]:.0f} ms a step ({result["bound_by"]}), '
        f'{result["tokens_per_second"]:,.0f} tokens/s, MFU {100 * result["mfu"]:.0f}%',
        'it does not fit' if not result['fits'] else 'it fits' if result['compiled'] else 'it may fit',
    ]
    return '\n'.join(lines)


def show_chips() -> str:
    """The table of chips: one device a row."""
    head = f'{"chip":10}{"bf16":>9}{"HBM":>9}{"usable":>9}{"HBM":>9}{"link":>9}{"DCN":>9}{"a host":>8}'
    units = f'{"":10}{"TFLOP/s":>9}{"GiB":>9}{"GiB":>9}{"GB/s":>9}{"GB/s":>9}{"GB/s":>9}{"devices":>8}'
    rows = [
        f'{name:10}{c.peak / 1e12:9.1f}{c.hbm / GIB:9.1f}{c.usable / GIB:9.2f}{c.bandwidth / 1e9:9.0f}'
        f'{(c.link if isinstance(c, Tpu) else c.nvlink) / 1e9:9.0f}{c.dcn / 1e9:9.2f}{c.host_devices:8}'
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
