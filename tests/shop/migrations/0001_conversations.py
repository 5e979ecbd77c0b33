from django.db import migrations


class Migration(migrations.Migration):
    dependencies = [("fsm_storage", "0001_initial")]
    operations = []
