-- The paper's 37 million pairs: its five datasets, 256 pixels and more, of DiffusionDB what is scored safe (0.2 at most).
-- The data of its stages at 256 pixels; those at 512 take `paper-512`.
SELECT source, shard, row FROM samples
WHERE status = 'ok'
  AND source IN ('sa1b', 'cc12m', 'textcaps', 'journeydb', 'diffusiondb')
  AND least(width, height) >= 256
  AND (source != 'diffusiondb' OR ((nullif(fields, '') ->> 'image_nsfw')::FLOAT <= 0.2
    AND (nullif(fields, '') ->> 'prompt_nsfw')::FLOAT <= 0.2))
