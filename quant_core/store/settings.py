"""What two runs differ in, said in words."""


def differences(before, now, keys=None, where: str = "") -> list[str]:
    """Phrases on the entries in which two settings, nested dicts of JSON values, differ; keys: of the
    outermost, all if None."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now]) if keys is None else keys
        return [
            d
            for k in keys
            for d in differences(before.get(k), now.get(k), None, f"{where}.{k}" if where else k)
        ]
    short = lambda value: f"{value}"[:40]
    return [] if before == now else [f"{where or 'settings'}: {short(before)} there, {short(now)} here"]
