"""The config: what it refuses and how it says so, overrides, what is saved, and the sizes of the shipped configs."""

import dataclasses
import json
import pathlib
import random
import re
import subprocess
import sys

import jax
import pytest

from transxssm_jax import cli, settings
from transxssm_jax import config as config_lib
from transxssm_jax.config import Config, ConfigError, Data, Mesh, Model, Optimizer, Train
from transxssm_jax.layer_pattern import parse_pattern, write_pattern
from transxssm_jax.model.parameters import count_params, init_params

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


@pytest.fixture
def write(tmp_path):
    def write(body, name='run.py'):
        path = tmp_path / name
        path.write_text('from transxssm_jax.config import *\n\n\ndef get_config():\n' + body)
        return path

    return write


@pytest.fixture
def path(write):
    return write('    return Config(model=Model(num_layers=8, d_model=128, num_heads=8))\n', '1st.py')


def says(*parts):
    """An error of one line that holds the parts."""
    return lambda error: '\n' not in str(error) and all(part in str(error) for part in parts)


# ---- single settings -------------------------------------------------------


@pytest.mark.parametrize(
    'assign, message',
    [
        (lambda c: setattr(c.model, 'd_modle', 3), 'unknown setting model.d_modle; did you mean d_model?'),
        (lambda c: setattr(c, 'modle', Model()), 'unknown setting modle; did you mean model?'),
        (lambda c: setattr(c.mesh, 'zzz', 3), 'unknown setting mesh.zzz; known: context, data, fsdp, slices, tensor'),
        (lambda c: Model(d_modle=3), 'unknown setting model.d_modle; did you mean d_model?'),
        (lambda c: Config(optimiser=Optimizer()), 'unknown setting optimiser; did you mean optimizer?'),
        (lambda c: setattr(c.model, 'd_model', '3'), "model.d_model='3' must be int, not str"),
        (lambda c: setattr(c.model, 'd_model', 3.5), 'model.d_model=3.5 must be int, not float'),
        (lambda c: setattr(c.model, 'd_model', float('inf')), 'model.d_model=inf must be int, not float'),
        (lambda c: setattr(c.optimizer, 'learning_rate', 10**400), 'optimizer.learning_rate='),
        (lambda c: setattr(c.data, 'path', 'a\0b'), "data.path='a\\x00b' must not hold a null character"),
        (lambda c: setattr(c.model, 'd_model', True), 'model.d_model=True must be int, not bool'),
        (lambda c: setattr(c.model, 'use_bias', 1), 'model.use_bias=1 must be bool, not int'),
        (lambda c: setattr(c.optimizer, 'learning_rate', True), 'optimizer.learning_rate=True must be float, not bool'),
        (
            lambda c: setattr(c.optimizer, 'learning_rate', float('inf')),
            'optimizer.learning_rate=inf must be a finite number',
        ),
        (lambda c: setattr(c, 'model', Data()), 'must be Model, not Data'),
        (lambda c: setattr(c.model, 'remat', 'ful'), "model.remat='ful': unknown policy 'ful'; did you mean full?"),
        (
            lambda c: setattr(c.model, 'pattern', '7xssm'),
            "model.pattern='7xssm': unknown mixer 'ssm'; did you mean ssd?",
        ),
        (
            lambda c: setattr(c.model, 'layer_loop', 'unroled'),
            "model.layer_loop='unroled' is not one of the choices; did you mean unrolled?",
        ),
        (
            lambda c: setattr(c.model, 'dtype', 'int8'),
            "model.dtype='int8' is not one of the choices; known: bfloat16, float32",
        ),
        (lambda c: setattr(c.train, 'steps', 0), 'train.steps=0 must be at least 1'),
        (lambda c: setattr(c.optimizer, 'clip_norm', -1.0), 'optimizer.clip_norm=-1.0 must be at least 0.0'),
        (lambda c: setattr(c.mesh, 'data', -2), 'mesh.data=-2 must be at least -1'),
    ],
)
def test_a_wrong_assignment_is_refused(assign, message):
    with pytest.raises(ConfigError) as error:
        assign(Config())
    assert says(message)(error.value), error.value


def test_an_integer_serves_as_a_float():
    assert Optimizer(learning_rate=1).learning_rate == 1.0
    assert type(Optimizer(learning_rate=1).learning_rate) is float


def test_every_default_is_valid_and_every_setting_has_a_meaning():
    config_lib.resolve(Config())
    for section in (Model, Data, Optimizer, Train, Mesh):
        for name, field in section.__dataclass_fields__.items():
            assert field.metadata['meaning'].endswith('.'), name
            assert type(field.default) is field.type, name


def test_a_resolved_config_is_locked(path):
    config = config_lib.load(path)
    for change in (lambda: setattr(config.model, 'd_model', 64), lambda: setattr(config, 'model', Model())):
        with pytest.raises(ConfigError, match='the config is locked; make a new one with config.replace'):
            change()
    assert config.model.d_model == 128
    Config().model.d_model = 64  # only that tree


# ---- what no single setting shows ------------------------------------------


@pytest.mark.parametrize(
    'overrides, message',
    [
        ({'model.num_heads': 7}, 'model.d_model=128 must be divisible by model.num_heads=7; try 112 or 224'),
        ({'model.num_kv_heads': 3}, 'model.num_heads=8 must be divisible by model.num_kv_heads=3; try 6 or 9'),
        ({'model.num_ssd_groups': 5}, 'model.num_heads=8 must be divisible by model.num_ssd_groups=5; try 5 or 10'),
        ({'model.num_layers': 12}, 'model.num_layers=12 must be divisible by layers per period=8; try 8 or 16'),
        ({'model.num_layers': 4}, 'try 8'),
        ({'model.num_heads': 16, 'model.num_kv_heads': 1, 'model.num_ssd_groups': 1}, '= 8 must be a multiple of 16'),
        ({'model.d_state': 24}, 'model.d_state=24 must be a multiple of 16; try 32'),
        ({'model.ssd_chunk_size': 40}, 'model.ssd_chunk_size=40 must be a multiple of 16; try 48'),
        ({'model.attention_offset': 8}, 'model.attention_offset=8 must be below model.attention_period=8; try 7'),
        ({'model.dt_min': 0.5}, 'model.dt_min=0.5 must be positive and at most model.dt_max=0.1'),
        ({'model.a_min': 0.0}, 'model.a_min=0.0 must be positive'),
        ({'optimizer.b2': 1.0}, 'optimizer.b2=1.0 must be below 1'),
        (
            {'train.accumulation_steps': 3},
            'data.global_batch=512 must be divisible by train.accumulation_steps=3; try 510 or 513',
        ),
        (
            {'train.steps': 999},
            'optimizer.warmup_steps = 1000 must be at most train.steps=999; lower optimizer.warmup_steps',
        ),
        (
            {'optimizer.schedule': 'wsd', 'train.steps': 1999},
            'optimizer.warmup_steps + optimizer.decay_steps = 2000 must be at most',
        ),
        ({'mesh.fsdp': -1}, 'at most one axis may be -1'),
        ({'mesh.tensor': 0}, 'none 0'),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(path, overrides, message):
    with pytest.raises(ConfigError) as error:
        config_lib.load(path, overrides)
    assert says(message)(error.value), error.value


@pytest.mark.parametrize(
    'changes, message',
    [
        (
            {'model.pattern': '4xmamba2,attention'},
            'model.num_layers=24 must be divisible by layers per period=5; try 20 or 25',
        ),
        ({'model.pattern': '7xmamba,attention'}, "unknown mixer 'mamba'; did you mean mamba2?"),
        ({'model.pattern': '7xrwkv'}, "unknown mixer 'rwkv'; known: attention, mamba2, ssd"),
        ({'model.pattern': '7 ssd'}, "has '7 ssd' where a kind of layer must be"),
        ({'model.pattern': 'ssd,,attention'}, "has '' where a kind of layer must be"),
        ({'model.pattern': '0xssd'}, "has '0xssd' where a kind of layer must be"),
        ({'model.pattern': '99999999999xssd'}, "has '99999999999xssd' where a kind of layer must be"),
        ({'model.pattern': '9999xssd'}, 'has more than 4096 layers'),
        (
            {'model.remat': '4xfull'},
            "model.remat='4xfull' lists 4 layers, and model.num_layers=24; name one policy for all layers, or one for each",
        ),
        ({'model.remat': '20xfull,4xauto'}, "model.remat='20xfull,4xauto': 'auto' stands alone"),
        ({'model.remat': '20xfull;4xnone'}, "has '20xfull;4xnone' where a remat policy must be"),
        (
            {'model.remat': '20xfull,4xnone', 'model.layer_loop': 'scan'},
            "differs between layers, which model.layer_loop='scan' runs as one; set model.layer_loop to 'auto'",
        ),
        ({'model.attention_encoding': 'conv1d_d'}, "model.attention_encoding='conv1d_d' is not one of the choices"),
        (
            {'model.ssd_encoding': 'conv1d'},
            "model.ssd_encoding='conv1d' is not one of the choices; did you mean conv1d_d?",
        ),
        ({'model.mamba2_encoding': 'rope'}, 'unknown setting model.mamba2_encoding; did you mean'),
        (
            {'model.pattern': 'ssd', 'model.attention_period': 4},
            "model.attention_period places no layer beside model.pattern='ssd'; change model.pattern",
        ),
    ],
)
def test_wrong_patterns(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        config_lib.replace(Config(), changes)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize('text', ['ssd', '7xssd,attention', 'mamba2,attention,2xmamba2'])
def test_a_pattern_is_read_as_it_is_written(text):
    assert write_pattern(parse_pattern(text)) == text
    assert parse_pattern(' 2xssd , ssd') == ('ssd',) * 3
    assert Model(pattern=text, attention_period=3).layer_pattern == parse_pattern(text)


def test_a_remat_policy_is_of_all_layers_or_of_each():
    assert Model(remat='full').remat_of_layers == ('full',) * 24
    assert Model(remat='20xfull, 3xhybrid,none').remat_of_layers == ('full',) * 20 + ('hybrid',) * 3 + ('none',)
    assert Model(remat='auto').remat_of_layers == ('hybrid',) * 24


def test_layer_patterns():
    assert Model(attention_period=4, attention_offset=2).layer_pattern == ('ssd', 'ssd', 'attention', 'ssd')
    assert Model(attention_period=1, attention_offset=0).layer_pattern == ('attention',)
    assert Model(attention_period=0).layer_pattern == ('ssd',)
    config_lib.resolve(Config(model=Model(attention_period=0)))  # the offset, 7, is then without meaning


# ---- files -----------------------------------------------------------------


@pytest.mark.parametrize(
    'body, parts',
    [
        (
            '    return Config(model=Model(d_modle=3))\n',
            ['line 5', 'unknown setting model.d_modle; did you mean d_model?'],
        ),
        (
            '    config = Config()\n    config.train.stepz = 3\n',
            ['line 6', 'unknown setting train.stepz; did you mean steps?'],
        ),
        ("    return Config(model=Model(d_model='3'))\n", ['line 5', "model.d_model='3' must be int, not str"]),
        ('    return Confg()\n', ['line 5', 'NameError', 'Confg']),
        ('    import nowhere_to_be_found\n', ['line 5', 'nowhere_to_be_found']),
        ('    return (\n', ['was never closed', 'line 5']),
        ('    return {}\n', ['must have a function get_config() that returns a transxssm_jax.config.Config']),
        ('    pass\n\n\ndel get_config\n', ['must have a function get_config()']),
    ],
)
def test_a_file_with_a_mistake_is_refused_naming_file_and_line(write, body, parts):
    path = write(body)
    with pytest.raises(ConfigError) as error:
        config_lib.load(path)
    assert says(str(path), *parts)(error.value), error.value
    assert 'Traceback' not in str(error.value)


def test_a_missing_file_is_refused_with_the_nearest(path):
    with pytest.raises(ConfigError) as error:
        config_lib.load(path.parent / '1ts.py')
    assert says('1ts.py: no such file; did you mean', '1st.py')(error.value)


def test_a_directory_is_no_config_file(path, tmp_path):
    with pytest.raises(ConfigError, match=f'--config={path.parent} is a directory; name a config file, such as {path}'):
        config_lib.load(path.parent)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ConfigError, match='empty is a directory; name a config file$'):
        config_lib.load(tmp_path / 'empty')


def test_one_file_says_nothing_about_the_next(path, write):
    assert config_lib.load(path).model.d_model == 128
    with pytest.raises(ConfigError, match='must have a function get_config'):
        config_lib.load(write('    pass\n\n\ndel get_config\n'))
    assert config_lib.load(path).model.d_model == 128


# ---- overrides -------------------------------------------------------------


def test_overrides_by_dictionary(path):
    config = config_lib.load(
        path,
        {
            'model.d_model': 256,
            'optimizer.learning_rate': 1,
            'train.progress': False,
            'data.path': 'a b=c',
            'optimizer.schedule': 'wsd',
            'mesh.fsdp': 2,
        },
    )
    assert (config.model.d_model, config.optimizer.learning_rate, config.train.progress) == (256, 1.0, False)
    assert (config.data.path, config.optimizer.schedule, config.mesh.fsdp) == ('a b=c', 'wsd', 2)
    assert config.model.num_heads == 8, 'what is not overridden stays as in the file'


COMMAND = cli.Command('command', 'A command.', [], settings=config_lib.describe)


def parse(*argv):
    return config_lib.from_flags(COMMAND.parse([str(word) for word in argv]))


def test_overrides_by_flag(path):
    config = parse(
        f'--config={path}',
        '--config.train.steps=2000',
        '--noconfig.train.progress',
        '--config.optimizer.learning_rate',
        '1e-3',
        '--config.train.steps=3000',
    )
    assert (config.train.steps, config.train.progress, config.optimizer.learning_rate) == (3000, False, 1e-3)
    assert config_lib.differences(config, config_lib.load(path)).keys() == {
        'train.steps',
        'train.progress',
        'optimizer.learning_rate',
    }


def test_the_file_and_its_overrides_come_in_any_order(path):
    expected = parse(f'--config={path}', '--config.train.steps=2000', '--config.mesh.slices=2')
    for file in ([f'--config={path}'], ['--config', path], ['-config', path]):
        for argv in (
            ['--config.mesh.slices=2', *file, '--config.train.steps=2000'],
            ['--config.mesh.slices=2', '--config.train.steps', '2000', *file],
        ):
            assert parse(*argv) == expected
    with pytest.raises(cli.UsageError, match='unexpected argument --config=other.py'):
        parse(f'--config={path}', '--', '--config=other.py')


@pytest.mark.parametrize(
    'name, value, message',
    [
        ('model.d_modle', 1, 'unknown setting model.d_modle; did you mean model.d_model?'),
        ('data.d_model', 1, 'unknown setting data.d_model; did you mean model.d_model?'),
        ('quite_another', 1, 'unknown setting quite_another'),
        ('model.d_model', 1.5, 'must be int'),
        ('model.d_model', 'wide', "model.d_model='wide' must be int"),
        ('train.progress', 'maybe', "train.progress='maybe' must be bool"),
        ('optimizer.learning_rate', 'nan', 'must be a finite number'),
        ('model.layer_loop', 'scam', "model.layer_loop='scam' is not one of the choices; did you mean scan?"),
        ('model.remat', 'ful', "model.remat='ful': unknown policy 'ful'; did you mean full?"),
        ('train.steps', 0, 'train.steps=0 must be at least 1'),
    ],
)
def test_a_wrong_override_is_refused(path, name, value, message):
    for attempt in (
        lambda: config_lib.load(path, {name: value}),
        lambda: parse(f'--config={path}', f'--config.{name}={value}'),
    ):
        with pytest.raises(ConfigError) as error:
            attempt()
        assert says(message)(error.value), error.value


@pytest.mark.parametrize(
    'argv, message',
    [
        ([], '--config=PATH is missing, e.g. --config=configs/tiny.py'),
        (
            ['--config=PATH', 'train.steps=3'],
            'unexpected argument train.steps=3; settings are given as --config.name=value',
        ),
        (['--config=PATH', '--steps=3'], 'unknown flag --steps'),
        (['--config'], '--config has no value'),
        (['--config.train.steps=2000', '--config'], '--config has no value'),
        (['--config=PATH', '--config.train.steps', '--workdir=a'], '--config.train.steps has no value'),
        (['--config=PATH', '--flagfile=/nonexistent'], 'unknown flag --flagfile'),
        (['--config=PATH', '--config.train'], '--config.train has no value'),
        (['--config=' + 'x' * 5000 + '.py'], 'File name too long'),
    ],
)
def test_a_wrong_command_line_is_refused(path, argv, message):
    with pytest.raises(cli.UserError) as error:
        parse(*(argument.replace('PATH', str(path)) for argument in argv))
    assert says(message)(error.value), error.value


# ---- saving and comparing --------------------------------------------------


def test_json_round_trip(path):
    config = config_lib.load(
        path, {'optimizer.learning_rate': 1.2345e-7, 'data.path': 'ü "x"', 'train.progress': False}
    )
    again = config_lib.from_json(config_lib.to_json(config))
    assert again == config and not config_lib.differences(again, config)
    with pytest.raises(ConfigError, match='locked'):
        again.train.steps = 3


def test_a_saved_config_of_an_older_version_takes_new_defaults():
    saved = json.loads(config_lib.to_json(config_lib.resolve(Config(model=Model(d_mlp=64)))))
    del saved['model']['norm_epsilon'], saved['mesh']
    config = config_lib.from_json(json.dumps(saved))
    assert config.model.d_mlp == 64 and config.model.norm_epsilon == Model().norm_epsilon and config.mesh == Mesh()


@pytest.mark.parametrize(
    'text, message',
    [
        ('{"model": ', 'not a saved config'),
        ('[]', 'not a saved config'),
        ('{"model": 3}', 'not a saved config'),
        ('{"modell": {"d_model": 3}}', 'unknown setting modell; did you mean model?'),
        ('{"__class__": {"tokens_per_step": 1}}', 'unknown setting __class__'),
        ('{"model": {"__class__": "x"}}', 'unknown setting model.__class__'),
        ('{"model": {"_locked": true}}', 'unknown setting model._locked'),
        ('{"tokens_per_step": 1}', 'unknown setting tokens_per_step'),
        ('{"model": {"head_dim": 64}}', 'unknown setting model.head_dim'),
        ('{"model": {"d_model": null}}', 'model.d_model=None must be int, not NoneType'),
        ('{"model": {"d_model": [3]}}', 'model.d_model=[3] must be int, not list'),
        ('{"model": {"attention_period": 9999999999}}', 'model.attention_period=9999999999 must be at most 4096'),
        ('{"train": {"steps": 1' + 5000 * '0' + '}}', 'not a saved config'),
        ('{"train": {"seed": 9223372036854775808}}', 'train.seed=9223372036854775808 must be at most 4294967295'),
        ('{"optimizer": {"learning_rate": NaN}}', 'must be a finite number'),
        (5000 * '[', 'not a saved config'),
        (b'\xff\xfe{}', 'not a saved config: it is not UTF-8 (byte 0)'),
        ('{"model": {"d_modl": 3}}', 'unknown setting model.d_modl'),
        ('{"model": {"d_model": "x"}}', "model.d_model='x' must be int"),
        ('{"model": {"num_heads": 31}}', 'must be divisible'),
    ],
)
def test_a_saved_config_that_is_none_is_refused(text, message):
    with pytest.raises(ConfigError) as error:
        config_lib.from_json(text)
    assert says(message)(error.value), error.value
    assert Config().tokens_per_step == 512 * 4096, 'the class is as it was'


def test_an_ml_collections_config_serves(write, path):
    pytest.importorskip('ml_collections')
    file = write(
        "    import ml_collections\n    return ml_collections.ConfigDict({'model': {'d_mlp': 64}, 'train': {'steps': 1e5}})\n"
    )
    config = config_lib.load(file)
    assert (config.model.d_mlp, config.train.steps, config.model.d_model) == (64, 100000, Model().d_model)
    assert config_lib.to_config_dict(config).model.d_mlp == 64
    file = write("    import ml_collections\n    return ml_collections.ConfigDict({'modell': {'d_mlp': 64}})\n")
    with pytest.raises(ConfigError, match='unknown setting modell; did you mean model?'):
        config_lib.load(file)


# ---- replacing, bounds, spellings ------------------------------------------


def test_replace_makes_another_config_and_leaves_the_first(path):
    config = config_lib.load(path)
    other = config_lib.replace(config, {'model.remat': 'full', 'train.steps': '1e4', 'data.path': '~/x'})
    assert config_lib.differences(config, other).keys() == {'model.remat', 'data.path'}
    assert other.data.path == str(pathlib.Path.home() / 'x')
    for changed in (config, other):
        with pytest.raises(ConfigError, match='locked'):
            changed.model.remat = 'none'
    assert config_lib.replace(config, {}) == config
    with pytest.raises(ConfigError, match='must be divisible'):
        config_lib.replace(config, {'model.num_heads': 7})


@pytest.mark.parametrize('text', ['100000', '1e5', '1E+5', '100_000', '1_00e3', ' 100000 ', '100000.0', '+100000', 1e5])
def test_a_whole_number_comes_in_any_usual_spelling(path, text):
    steps = config_lib.load(path, {'train.steps': text}).train.steps
    assert steps == 100000 and type(steps) is int


@pytest.mark.parametrize('text', ['1e-5', '1.5', '1e400', 'nan', '', '1e', '0x10', 'ten', '1,000', '9' * 5000])
def test_what_is_no_whole_number_is_refused(path, text):
    with pytest.raises(ConfigError) as error:
        config_lib.load(path, {'train.steps': text})
    assert says('must be int (a whole number)')(error.value) and len(str(error.value)) < 400


def test_every_number_of_a_size_has_a_bound():
    for name, field in settings.walk(Config):
        if field.type is int:
            most = field.metadata['maximum']
            assert most <= settings.LARGEST_INT or (name.endswith('.seed') and most == settings.LARGEST_SEED), name
            section, leaf = name.split('.')
            with pytest.raises(ConfigError, match=f'{name}=.* must be at most {most}'):
                setattr(getattr(Config(), section), leaf, most + 1)


def test_the_largest_seed_is_one_that_jax_takes():
    assert jax.random.key_data(jax.random.key(settings.LARGEST_SEED)).shape == (2,)


# ---- anything at all -------------------------------------------------------

WORDS = [
    '',
    '0',
    '-1',
    '1',
    '16',
    '1e5',
    '1e400',
    '-0.0',
    'nan',
    'inf',
    'true',
    'None',
    '[]',
    '{}',
    '~',
    '~nobody/x',
    'a b=c',
] + ['\n', '\udcff', 'ü', '9' * 30, '9' * 5000, 'none', 'hybrid', '0x10', '1_0', '1__0', '--', '-', '=', '%s{}', '\0']
VALUES = [
    None,
    True,
    0,
    -1,
    16,
    2**31,
    2**63,
    10**400,
    0.5,
    1e5,
    float('nan'),
    float('inf'),
    [],
    [1],
    {},
    {'a': 1},
    b'x',
]


def test_any_override_is_taken_or_refused_in_one_line(path):
    rng, names = random.Random(0), [name for name, _ in settings.walk(Config)]
    odd = [
        '',
        '.',
        'model',
        'model.',
        '.model',
        'model.d_model.x',
        '__class__',
        'model.__dict__',
        '_locked',
        'ü' * 9999,
    ]
    base, taken = config_lib.load(path), 0
    for _ in range(600):
        changes = {
            rng.choice(names + odd[: rng.randint(0, 1) * len(odd)]): rng.choice(WORDS if rng.random() < 0.6 else VALUES)
            for _ in range(1 + (rng.random() < 0.2))
        }
        try:
            config = config_lib.replace(base, changes)
        except ConfigError as error:
            assert '\n' not in str(error) and 0 < len(str(error)) < 700, changes
        else:
            assert config_lib.from_json(config_lib.to_json(config)) == config
            taken += 1
    assert 30 < taken < 570


def test_any_saved_config_is_taken_or_refused_in_one_line():
    rng, text = random.Random(1), config_lib.to_json(config_lib.resolve(Config()))
    tree, taken = json.loads(text), 0
    for _ in range(600):
        damaged = json.loads(text)
        section = rng.choice(list(tree))
        kind = rng.choice((0, 0, 0, 1, 2, 3))
        if kind == 0:  # another value
            damaged[section][rng.choice(list(tree[section]))] = rng.choice([*VALUES[:-1], *WORDS])
        elif kind == 1:  # another name
            damaged[section][rng.choice(['x', '__class__', '', '_locked', '__init__'])] = 1
        elif kind == 2:  # another section
            damaged[rng.choice([section, 'x', '__class__', '__dict__'])] = rng.choice([*VALUES[:-1], *WORDS])
        raw = bytearray(json.dumps(damaged).encode())
        if kind == 3:  # other bytes
            for _ in range(rng.randint(1, 3)):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
        try:
            config = config_lib.from_json(bytes(raw[: rng.choice([*[len(raw)] * 5, rng.randrange(len(raw))])]))
        except ConfigError as error:
            assert '\n' not in str(error) and len(str(error)) < 700
        else:
            assert config_lib.from_json(config_lib.to_json(config)) == config
            taken += 1
    assert 15 < taken < 585
    assert Config() == settings.copy(Config()) and Config.__name__ == 'Config'


def test_differences_and_what_a_checkpoint_binds(path):
    ours = config_lib.load(path)
    theirs = config_lib.load(path, {'model.d_mlp': 64, 'train.steps': 2000, 'mesh.fsdp': 2, 'data.seed': 1})
    assert config_lib.differences(ours, theirs) == {
        'model.d_mlp': (6144, 64),
        'train.steps': (10000, 2000),
        'mesh.fsdp': (1, 2),
        'data.seed': (0, 1),
    }
    assert config_lib.unfit_for_checkpoint(ours, theirs) == [
        'model.d_mlp is 6144 in the checkpoint and 64 in this config',
        'data.seed is 0 in the checkpoint and 1 in this config',
    ]
    assert config_lib.unfit_for_checkpoint(ours, ours) == []


def test_a_checkpoint_binds_every_setting_that_shapes_the_parameters():
    base = Model(
        d_model=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        num_ssd_groups=2,
        d_state=16,
        d_mlp=32,
        vocab_size=64,
        attention_period=2,
        attention_offset=1,
    )
    changes = dict(
        d_model=128,
        num_layers=8,
        num_heads=2,
        num_kv_heads=4,
        num_ssd_groups=4,
        d_state=32,
        d_mlp=64,
        vocab_size=128,
        attention_period=4,
        tie_embeddings=False,
        use_bias=True,
        use_dt_bias=False,
    )
    free = {name for name, field in Model.__dataclass_fields__.items() if not field.metadata['of_checkpoint']}

    def shapes(model):
        return jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(lambda: init_params(model, 0)))

    for name, value in changes.items():
        assert shapes(dataclasses.replace(base, **{name: value})) != shapes(base), name
        assert name not in free, name
    other = {bool: lambda v: not v, int: lambda v: v + 16, float: lambda v: v * 1.1, str: lambda v: v}
    changed = {name: other[type(getattr(base, name))](getattr(base, name)) for name in free}
    assert shapes(dataclasses.replace(base, **changed)) == shapes(base)


def test_every_setting_is_described():
    lines = config_lib.describe().splitlines()
    assert len(lines) == len(config_lib.flatten(Config()))
    assert '--config.train.steps=10000  Steps of the whole run.' in lines


# ---- the shipped configs ---------------------------------------------------


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')), ids=lambda path: path.stem)
def test_a_shipped_config_loads(path):
    config = config_lib.load(path)
    assert config_lib.from_json(config_lib.to_json(config)) == config
    docstring = path.read_text().split('"""')[1]
    assert f'configs/{path.name}' in docstring or 'make demo' in docstring, 'the docstring names the command'


@pytest.mark.parametrize('name, count', [('1p3b', 1.30e9), ('320m', 320e6)])
def test_parameter_counts(name, count):
    model = config_lib.load(CONFIGS / f'{name}.py').model
    assert count_params(model) == pytest.approx(count, rel=0.01)
    assert model.vocab_size == 50304 and model.tie_embeddings
    assert model.layer_pattern == ('ssd',) * 7 + ('attention',)
    assert _parameters(model) == count_params(model)


PATTERNS = {'llama3': ('attention',), 'mamba2': ('mamba2',), 'jamba': ('mamba2',) * 7 + ('attention',)}


@pytest.mark.parametrize('size, count', [('1p3b', 1.30e9), ('320m', 320e6)])
@pytest.mark.parametrize('name', PATTERNS)
def test_baselines_differ_in_the_layers_alone(name, size, count):
    ours, other = (config_lib.load(CONFIGS / f'{file}.py') for file in (size, f'{name}_{size}'))
    assert other.model.layer_pattern == PATTERNS[name]
    assert count_params(other.model) == pytest.approx(count, rel=0.01)
    assert count_params(other.model) == pytest.approx(count_params(ours.model), rel=0.01)
    assert set(config_lib.differences(ours, other)) <= {'model.pattern', 'model.d_mlp', 'model.attention_encoding'}
    assert (other.model.attention_encoding == 'none') == (name == 'jamba')


def _parameters(model):
    """The same count, by hand."""
    D, H, P = model.d_model, model.num_heads, model.d_model // model.num_heads
    mlp_and_norms = 3 * D * model.d_mlp + 4 * D
    ssd = 2 * D * H * P + 2 * D * model.num_ssd_groups * model.d_state + D * H + 2 * H
    attention = 2 * D * H * P + 2 * D * model.num_kv_heads * P
    return model.vocab_size * D + D + model.num_layers * mlp_and_norms + model.num_layers // 8 * (7 * ssd + attention)


def test_reading_a_config_needs_no_jax(path):
    program = (
        f'import sys; from transxssm_jax import config; config.load({str(path)!r}); '
        'assert "jax" not in sys.modules and "numpy" not in sys.modules; print("clean")'
    )
    result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=60)
    assert result.stdout == 'clean\n', result.stderr
