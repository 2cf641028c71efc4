-- Of every source what is once, in no test set, safe, sharp and not tiny, no banner, and no picture of text.
-- Asks for `microdit dedup`, `microdit decontaminate`, and the columns scores/basic, scores/nsfw and scores/text; what
-- has no score is left out; of duplicates the largest that is all of this stays. Take it as a beginning: the page of
-- `microdit report` shows what each condition drops.
SELECT source, shard, row FROM samples
WHERE status = 'ok'
  AND duplicate_keep IS NOT NULL
  AND NOT contaminated
  AND nsfw <= 0.2
  AND text_area <= 0.1
  AND least(width, height) >= 256
  AND greatest(width, height) <= 3 * least(width, height)
  AND basic_sharpness >= 20
QUALIFY one_per_group(duplicate_group)
