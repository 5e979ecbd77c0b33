"""MariaDB and MySQL: texts that differ in a byte differ, and what Django leaves out there is made."""

from django.db import migrations, models

EXACT = [
    "fsmrecord", "fsmtransition", "fsmlease", "fsmhourlymove", "fsmhourlypath", "fsmrun", "fsmrollupmark",
    "fsmbulk", "fsmbulkitem",
]
INDEXES = {
    "fsm_storage_record_updated": ["updated_at"],  # walked backwards, which the admin's order by id needs too
    "fsm_storage_record_state": ["state"],
    "fsm_storage_record_state_exp": ["state_expires_at"],
    "fsm_storage_record_data_exp": ["data_expires_at"],
}
CLOCKS = [
    ("fsm_storage_record", "created_at"),
    ("fsm_storage_record", "updated_at"),
    ("fsm_storage_transition", "at"),
    ("fsm_storage_peer", "updated_at"),
    ("fsm_storage_bulk", "created_at"),
]
# json_valid(), which checks a JSON column, gives up at 32 levels of nesting.
DEEP = [
    ("fsm_storage_record", "data", "NOT NULL"),
    ("fsm_storage_transition", "data_before", "NULL"),
    ("fsm_storage_transition", "data_after", "NULL"),
    ("fsm_storage_bulk_item", "before", "NULL"),
]


def exact_collation(connection):
    """Case, accents, compositions and spaces at the end make a difference, and an index holds it."""
    return "utf8mb4_nopad_bin" if connection.mysql_is_mariadb else "utf8mb4_0900_bin"


def prepare(apps, schema_editor):
    connection = schema_editor.connection
    if connection.vendor != "mysql":
        return
    collation = exact_collation(connection)
    for name in EXACT:
        table = apps.get_model("fsm_storage", name)._meta.db_table
        schema_editor.execute(
            f"ALTER TABLE {table} ENGINE = InnoDB, CONVERT TO CHARACTER SET utf8mb4 COLLATE {collation}"
        )
    schema_editor.execute("ALTER TABLE fsm_storage_peer ENGINE = InnoDB, CONVERT TO CHARACTER SET utf8mb4")
    if connection.mysql_is_mariadb:
        for table, column, null in DEEP:
            schema_editor.execute(
                f"ALTER TABLE {table} MODIFY `{column}` longtext CHARACTER SET utf8mb4 COLLATE {collation} {null}"
            )
    # Django's Now() is the time of the session's zone there.
    for table, column in CLOCKS:
        schema_editor.execute(f"ALTER TABLE {table} ALTER COLUMN {column} SET DEFAULT (UTC_TIMESTAMP(6))")
    _add_indexes(apps.get_model("fsm_storage", "fsmrecord"), schema_editor)


def _add_indexes(model, schema_editor):
    """Make the indexes with a condition or an expression, which Django leaves out, as plain ones."""
    connection = schema_editor.connection
    with connection.cursor() as cursor:
        existing = connection.introspection.get_constraints(cursor, model._meta.db_table)
    for name, fields in INDEXES.items():
        if name not in existing:
            schema_editor.add_index(model, models.Index(fields=fields, name=name))


class Migration(migrations.Migration):

    dependencies = [
        ('fsm_storage', '0006_names'),
    ]

    operations = [
        # Not atomic: their DDL commits by itself.
        migrations.RunPython(prepare, migrations.RunPython.noop, atomic=False),
    ]
