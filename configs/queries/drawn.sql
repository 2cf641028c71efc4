-- What models drew of prompts (sources `synthesize`), each picture once. Asks for `microdit dedup`; a condition such as
-- `clip >= 0.2` beside it drops pictures that are far from their prompts.
SELECT source, shard, row FROM samples
WHERE status = 'ok'
  AND duplicate_keep IS NOT NULL
  AND (nullif(fields, '') ->> 'maker') IS NOT NULL
QUALIFY one_per_group(duplicate_group)
