"""Which documents a batch holds, for people to read."""

from collections.abc import Iterator

from transxssm_jax.data.documents import Documents
from transxssm_jax.data.loader import Loader
from transxssm_jax.data.manifest import Manifest

FIRST_WORDS = 8
_TOKENS_READ = 8 * FIRST_WORDS  # of a document's beginning
_MOST_CHARACTERS = 80


def describe(loader: Loader, step: int, tokenizer) -> Iterator[str]:
    """A line for every document in every row that the loader reads of a step.

    Args:
      loader: of the split.
      step: steps before the batch: 0 is the first batch of a run.
      tokenizer: of the data.

    Yields:
      the row within what the loader reads; the document's index in the split and its source; which of its slots
      (input, target) the row holds, and of how many; its first words, decoded, whichever part of it the row holds.

    Raises:
      DataError: a shard is broken.
    """
    documents = [Documents(part.manifest, part.lengths) for part in loader.parts]
    for row, (index, spans) in enumerate(loader.row_spans(step)):
        part = loader.parts[index]
        lengths = [int(part.lengths[document]) for document, _, _ in spans]
        begins = [(document, 0, min(length, _TOKENS_READ)) for (document, _, _), length in zip(spans, lengths)]
        for (document, start, stop), length, tokens in zip(spans, lengths, documents[index].read(begins), strict=True):
            stored = [int(token) if token >= 0 else ~int(token) for token in tokens[1:]]  # `read` begins with an input
            words = ' '.join(tokenizer.decode(stored).split()[:FIRST_WORDS])[:_MOST_CHARACTERS]
            source = source_of(part.manifest, document)
            source = f'{part.name} ({source})' if part.name else source
            yield f'row {row}: document {document} of {source}, slots {start} to {stop} of {length}: {words!r}'


def source_of(manifest: Manifest, document: int) -> str:
    """What prepare's --source was for a document of a split."""
    return next(
        source.spec
        for source in manifest.sources
        if source.first_document <= document < source.first_document + source.documents
    )
