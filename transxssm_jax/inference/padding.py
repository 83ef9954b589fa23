"""The sizes that rows and batches are padded to, so that few shapes are compiled."""

SHORTEST = 32


def padded_length(length: int) -> int:
    """The least of 32, 48, 64, 96, 128, 192, ... (2^n and 1.5 x 2^n) that is not below `length`.

    Two sizes per octave rather than four or one, because a compilation costs more than the padding that it saves:
    HellaSwag, PIQA, ARC-easy and LAMBADA (4.2M tokens, batches of 32,768) need 8 shapes and are padded to 1.22 times
    their tokens; four sizes per octave need 14 shapes for 1.14 times, one size 5 shapes for 1.38 times. The 8% are
    340,000 tokens, a few seconds of a 1.3B model on one GPU, which one compilation of that model takes by itself.
    """
    size = max(SHORTEST, 1 << (length - 1).bit_length())
    return size * 3 // 4 if size > SHORTEST and length <= size * 3 // 4 else size


def padded_count(count: int, most: int) -> int:
    """The least power of two that is not below `count`, or `most` where that is less: rows of a batch."""
    return min(1 << (count - 1).bit_length(), max(count, most))
