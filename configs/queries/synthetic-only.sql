-- Generated images alone: JourneyDB and DiffusionDB, whatever else is in the corpus.
SELECT source, shard, row FROM samples
WHERE status = 'ok'
  AND source IN ('journeydb', 'diffusiondb')
